// Which weights are multiplied with which elements of the layout: for a conv, and for its input's gradient.
#pragma once
#include "base/multiply.h"
#include "base/pixels.h"

namespace DYCONVERT_TARGET {

// Pixels of the result that have the same weights, at the same offsets from each pixel.
template <typename T>
struct Phase {
  Pixels<T> pixels;
  i64 at;  // the phase's first pixel in the result's plane
  // table: the offset of the element that each weight is multiplied with; empty if the layout has the elements in the
  // kernel's order. steps: where each weight is in a row of the kernel.
  std::vector<int32_t> table = {}, steps = {};

  const int32_t* offsets() const { return table.data(); }

  i64 elements() const { return steps.size(); }

  template <typename Layout>
  void meet(const Layout& layout, i64 channel, i64 y, i64 x, i64 step) {
    if constexpr (Layout::kOffsets) table.push_back(layout.offset(channel, y, x));
    steps.push_back(step);
  }
};

// A conv has one phase, with all pixels; it takes a row of the kernel in the order in which it lies.
template <typename T, typename Layout>
std::vector<Phase<T>> phases_of_conv(const Shape& s, const Layout& layout) {
  const Grid grid{s.out_height, s.out_width, s.out_channel, s.out_width * s.out_pixel, s.out_pixel};
  Phase<T> phase{Pixels<T>(grid, layout.pitch()), 0};
  const i64 channels = s.group_in(), taps = s.taps();
  for (i64 k = 0; k < s.elements(); k++) {
    const i64 channel = s.bank_last ? k % channels : k / taps, tap = s.bank_last ? k / channels : k % taps;
    phase.meet(layout, channel, tap / s.kernel_width * s.dilation_y, tap % s.kernel_width * s.dilation_x, k);
  }
  return {phase};
}

// Along one axis, the output's pixel that reads pixel p of the input through tap k of the kernel:
// (p + padding - k dilation) / stride, if that is a whole number.
struct Reach {
  i64 stride, padding, dilation, taps;

  bool meets(i64 phase, i64 tap) const { return (phase + padding - tap * dilation) % stride == 0; }
  // That pixel, minus the input's pixel divided by the stride.
  i64 of(i64 phase, i64 tap) const { return (phase + padding - tap * dilation) / stride; }
  template <typename F>
  i64 extreme(i64 length, const F& better) const {
    i64 best = 0;
    bool any = false;
    for (i64 phase = 0; phase < min(stride, length); phase++)
      for (i64 tap = 0; tap < taps; tap++)
        if (meets(phase, tap) && (!any || better(of(phase, tap), best))) any = true, best = of(phase, tap);
    return best;
  }
  i64 first(i64 length) const { return extreme(length, [](i64 a, i64 b) { return a < b; }); }
  i64 last(i64 length) const { return extreme(length, [](i64 a, i64 b) { return a > b; }); }
};

inline Reach reach_y(const Shape& s) { return {s.stride_y, s.padding_y, s.dilation_y, s.kernel_height}; }
inline Reach reach_x(const Shape& s) { return {s.stride_x, s.padding_x, s.dilation_x, s.kernel_width}; }

// The gradient of the input as a conv of the output's gradient, [N, C_out, oH, oW]: the shape of that conv.
inline Shape gradient_as_conv(const Shape& s) {
  const Reach y = reach_y(s), x = reach_x(s);
  Shape conv = s;
  conv.in_channels = s.out_channels;
  conv.height = s.out_height;
  conv.width = s.out_width;
  conv.stride_y = conv.stride_x = conv.dilation_y = conv.dilation_x = 1;
  conv.padding_y = -y.first(s.height);
  conv.padding_x = -x.first(s.width);
  conv.kernel_height = y.last(s.height) - y.first(s.height) + 1;
  conv.kernel_width = x.last(s.width) - x.first(s.width) + 1;
  conv.out_height = divided_up(s.height, s.stride_y);
  conv.out_width = divided_up(s.width, s.stride_x);
  conv.x_image = s.out_channels * s.pixels();
  conv.x_channel = s.pixels();
  conv.x_row = s.out_width;
  conv.x_column = 1;
  return conv;
}

// The gradient of the input, [N, C_in, H, W]: each phase of the stride has its own taps.
// Kernels are mixed to [C_out, ld], where an output channel has the taps of each input channel one behind the other.
template <typename T, typename Layout>
std::vector<Phase<T>> phases_of_gradient(const Shape& s, const Layout& layout, i64 ld) {
  const Reach reach[] = {reach_y(s), reach_x(s)};
  const i64 first_y = reach[0].first(s.height), first_x = reach[1].first(s.width);
  std::vector<Phase<T>> phases;
  for (i64 phase_y = 0; phase_y < min(s.stride_y, s.height); phase_y++)
    for (i64 phase_x = 0; phase_x < min(s.stride_x, s.width); phase_x++) {
      const Grid grid{divided_up(s.height - phase_y, s.stride_y), divided_up(s.width - phase_x, s.stride_x),
                      s.height * s.width, s.stride_y * s.width, s.stride_x};
      Phase<T> phase{Pixels<T>(grid, layout.pitch()), phase_y * s.width + phase_x};
      for (i64 channel = 0; channel < s.group_out(); channel++)
        for (i64 tap = 0; tap < s.taps(); tap++) {
          const i64 y = tap / s.kernel_width, x = tap % s.kernel_width;
          if (reach[0].meets(phase_y, y) && reach[1].meets(phase_x, x))
            phase.meet(layout, channel, reach[0].of(phase_y, y) - first_y, reach[1].of(phase_x, x) - first_x,
                      channel * ld + tap);
        }
      phases.push_back(phase);
    }
  return phases;
}

}  // namespace DYCONVERT_TARGET
