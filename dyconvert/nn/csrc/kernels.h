// Which kernel computes a conv or a gradient, and the functions that a target offers.
#pragma once
#include "depthwise/bank_gradient.h"
#include "depthwise/conv.h"
#include "depthwise/last.h"
#include "direct/bank_gradient.h"
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
  constexpr i64 n = kLanes<T>;
  const i64 pitch = s.out_width + (s.kernel_width - 1) * s.dilation_x;
  const i64 planes = min(s.out_height * divided_up(s.out_width, n),
                         divided_up((s.out_height - 1) * pitch + s.out_width, n));
  const i64 panels = s.pixels() > n && s.pixels() % n == 1 ? s.pixels() / n : divided_up(s.pixels(), n);
  return s.pixels() >= n && 6 * (planes - panels) >= planes;
}

template <typename T>
DyconvertPath path_of(const Shape& s, DyconvertTask task) {
  if (task == kBankGradient)
    return s.group_in() == 1 ? kDepthwiseProducts : winograd_pays<T>(s) ? kTileProducts : kPixelProducts;
  if (task == kOutput && takes_channels_last<T>(s)) return kDepthwiseLast;
  if (s.group_in() == 1) return kDepthwise;
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
