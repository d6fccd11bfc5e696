// Which kernel computes a conv or a gradient, and the functions that a target offers.
#pragma once
#include "depthwise/bank_gradient.h"
#include "depthwise/conv.h"
#include "depthwise/last.h"
#include "direct/bank_gradient.h"
#include "direct/channels.h"
#include "direct/conv.h"
#include "interface.h"
#include "linear/linear.h"
#include "winograd/conv.h"

namespace DYCONVERT_TARGET {

// Whether panels are faster than planes: for 1 x 1 convs without padding. For others, only with at least 16 input and
// 48 output channels per group, which outweigh gathering the panels, and only where planes are slow: with a stride,
// whose phases would touch too many pages, or where gaps between a plane's rows would fill a sixth of the vectors.
template <typename T>
inline bool in_panels(const Shape& s, bool gradient) {
  if (s.taps() == 1 && !s.padding_y && !s.padding_x) return true;
  if (gradient || s.group_in() < 16 || s.group_out() < 48) return false;
  if (s.stride_y * s.stride_x > 1) return true;
  const i64 n = kLanes<T>, planes = vectors_of_planes<T>(s);
  const i64 panels = s.pixels() > n && s.pixels() % n == 1 ? s.pixels() / n : divided_up(s.pixels(), n);
  return s.pixels() >= n && 6 * (planes - panels) >= planes;
}

// In one direction, the number of pairs of a pixel and a tap that read the input, not its padding. Stride 1.
inline i64 pairs_inside(i64 pixels, i64 length, i64 taps, i64 dilation, i64 padding) {
  i64 pairs = 0;
  for (i64 tap = 0; tap < taps; tap++)
    pairs += max<i64>(0, min(pixels, length + padding - tap * dilation) - max<i64>(0, padding - tap * dilation));
  return pairs;
}

// Measured with vectors of 64 bytes only. Those of 32 bytes would need microtiles of several vectors.
constexpr bool kChannelsMeasured = DYCONVERT_VECTOR == 64;

// Whether vectors of output channels are faster, counted as in `winograd_cost`: they leave out padding and lanes
// without a pixel, but kernels are transposed, which takes as long as half a vector for each tap.
template <typename T>
inline bool in_channels(const Shape& s) {
  if (!kChannelsMeasured || s.taps() == 1 || s.stride_y * s.stride_x > 1 || s.group_in() < 16) return false;
  if (s.out_width < 5) return false;  // with fewer sums, each waits for the one before it
  const i64 n = kLanes<T>, blocks = divided_up(s.group_out(), n), pieces = blocks * s.groups * s.images;
  const double pairs = pairs_inside(s.out_height, s.height, s.kernel_height, s.dilation_y, s.padding_y) *
                       pairs_inside(s.out_width, s.width, s.kernel_width, s.dilation_x, s.padding_x);
  const double empty_lanes = double(blocks * n) / s.group_out(), idle = double(rounded_up(pieces, s.threads)) / pieces;
  const double cost = (pairs / n + s.taps() / 2.) * empty_lanes * idle;
  const i64 vectors = in_panels<T>(s, false) ? divided_up(s.pixels(), n) : vectors_of_planes<T>(s);
  return cost < min(0.95 * s.taps() * vectors, 0.8 * winograd_cost<T>(s));  // as measured
}

template <typename T>
DyconvertPath path_of(const Shape& s, DyconvertTask task) {
  if (task == kBankGradient)
    return s.group_in() == 1 ? kDepthwiseProducts : winograd_pays<T>(s) ? kTileProducts : kPixelProducts;
  if (task == kOutput && takes_channels_last<T>(s)) return kDepthwiseLast;
  if (s.group_in() == 1) return kDepthwise;
  if (task == kOutput && in_channels<T>(s)) return kChannels;
  if (winograd_pays<T>(s)) return kWinograd;
  return in_panels<T>(s, task == kInputGradient) ? kPanels : kPlanes;
}

template <typename Kind, typename T, typename B>
void compute_with_scratch(Problem<T, B>& problem) {
  Kind kind(problem);
  problem.scratch = scratch<T>().of(kind.scratch_elements());
  kind.compute();
}

template <typename T, typename B, Task task>
void convolve(const Shape& s, ParallelFor parallel_for, const DyconvertTensors& t) {
  Problem<T, B> problem{s,
                        parallel_for,
                        static_cast<const T*>(t.x),
                        static_cast<const B*>(t.bank),
                        static_cast<const T*>(t.eta),
                        static_cast<const T*>(t.factors),
                        static_cast<const T*>(t.bias),
                        static_cast<const T*>(t.shift),
                        static_cast<T*>(t.out),
                        nullptr,
                        static_cast<const T*>(t.mean),
                        static_cast<const T*>(t.scale)};
  switch (path_of<T>(s, task)) {
    case kDepthwiseLast: return DepthwiseLast<T, B>(problem).compute();
    case kDepthwise: return Depthwise<T, B, task>(problem).compute();
    case kWinograd: return compute_with_scratch<WinogradConv<T, B, task>>(problem);
    case kChannels:
      if constexpr (kChannelsMeasured && task == kOutput) return compute_with_scratch<ChannelConv<T, B>>(problem);
      [[fallthrough]];
    case kPanels: return compute_with_scratch<Conv<T, B, Panels, task>>(problem);
    default: return compute_with_scratch<Conv<T, B, Planes, task>>(problem);
  }
}

template <typename T>
void bank_gradient(const Shape& shape, ParallelFor parallel_for, const DyconvertTensors& t) {
  const Gradients<T> to{shape,
                        parallel_for,
                        static_cast<const T*>(t.grad),
                        static_cast<const T*>(t.x),
                        static_cast<const T*>(t.bank),
                        static_cast<const T*>(t.eta),
                        static_cast<const T*>(t.factors),
                        static_cast<T*>(t.grad_bank),
                        static_cast<T*>(t.grad_eta),
                        static_cast<T*>(t.grad_factors)};
  switch (path_of<T>(shape, kBankGradient)) {
    case kDepthwiseProducts: return DepthwiseBankGradient<T>(to).compute();
    case kTileProducts: return BankGradient<T, TileProducts>(to).compute();
    default: return BankGradient<T, PixelProducts>(to).compute();
  }
}

inline DyconvertPath path(const void* shape, DyconvertTask task, DyconvertType type) {
  const Shape& s = *static_cast<const Shape*>(shape);
  return type == kFloat64 ? path_of<double>(s, task) : path_of<float>(s, task);
}

inline void convolve_any(const void* shape, ParallelFor parallel_for, const DyconvertTensors& t, DyconvertTask task,
                         DyconvertType type, DyconvertType bank_type) {
  const Shape& s = *static_cast<const Shape*>(shape);
  if (task == kInputGradient)
    type == kFloat64 ? convolve<double, double, Task::kInputGradient>(s, parallel_for, t)
                     : convolve<float, float, Task::kInputGradient>(s, parallel_for, t);
  else if (type == kFloat64)
    convolve<double, double, Task::kOutput>(s, parallel_for, t);
  else if (bank_type == kFloat16)
    convolve<float, Float16, Task::kOutput>(s, parallel_for, t);
  else if (bank_type == kBFloat16)
    convolve<float, BFloat16, Task::kOutput>(s, parallel_for, t);
  else if (bank_type == kInt8)
    convolve<float, Int8, Task::kOutput>(s, parallel_for, t);
  else
    convolve<float, float, Task::kOutput>(s, parallel_for, t);
}

inline void bank_gradient_any(const void* shape, ParallelFor parallel_for, const DyconvertTensors& t,
                              DyconvertType type) {
  const Shape& s = *static_cast<const Shape*>(shape);
  type == kFloat64 ? bank_gradient<double>(s, parallel_for, t) : bank_gradient<float>(s, parallel_for, t);
}

inline void linear_any(const DyconvertLinear& layer, ParallelFor parallel_for, DyconvertType weight_type) {
  if (weight_type == kInt8)
    linear<Int8>(layer, parallel_for);
  else if (weight_type == kBFloat16)
    linear<BFloat16>(layer, parallel_for);
  else
    linear<float>(layer, parallel_for);
}

// The table of functions that a target's file exports.
constexpr DyconvertTarget target_of(const char* name, int (*runs_here)()) {
  return {name, sizeof(Shape), DYCONVERT_VECTOR, runs_here, path, convolve_any, bank_gradient_any, linear_any};
}

}  // namespace DYCONVERT_TARGET
