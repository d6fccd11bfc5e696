// Which weights meet which elements of what is laid out: of a conv, and of its input's gradient.
#pragma once
#include "base/multiply.h"
#include "base/pixels.h"

namespace DYCONVERT_TARGET {

// Pixels of the result for which the same weights meet the same elements, seen from where each pixel is.
template <typename T>
struct Part {
  Pixels<T> pixels;
  i64 at;  // the part's first pixel in the result's plane
  // Where the elements are that the weights meet, if the layout doesn't have them in order; and the weights in a row of
  // the kernel.
  std::vector<int32_t> table = {}, steps = {};

  const int32_t* offsets() const { return table.data(); }

  i64 elements() const { return steps.size(); }

  template <typename Layout>
  void meet(const Layout& layout, i64 channel, i64 y, i64 x, i64 step) {
    if constexpr (Layout::kOffsets) table.push_back(layout.offset(channel, y, x));
    steps.push_back(step);
  }
};

// A conv: all pixels alike, and a row of the kernel in the order in which it lies.
template <typename T, typename Layout>
std::vector<Part<T>> parts_of_conv(const Shape& s, const Layout& layout) {
  const Grid grid{s.out_height, s.out_width, s.out_channel, s.out_width * s.out_pixel, s.out_pixel};
  Part<T> part{Pixels<T>(grid, layout.pitch()), 0};
  const i64 channels = s.group_in(), taps = s.taps();
  for (i64 k = 0; k < s.elements(); k++) {
    const i64 channel = s.bank_last ? k % channels : k / taps, tap = s.bank_last ? k / channels : k % taps;
    part.meet(layout, channel, tap / s.kernel_width * s.dilation_y, tap % s.kernel_width * s.dilation_x, k);
  }
  return {part};
}

// In one direction, which of the output's pixels meets pixel p of the input, through tap k of the kernel:
// (p + padding - k dilation) / stride, if that is whole.
struct Reach {
  i64 stride, padding, dilation, taps;

  bool meets(i64 phase, i64 tap) const { return (phase + padding - tap * dilation) % stride == 0; }
  // From the pixel of the input divided by the stride.
  i64 of(i64 phase, i64 tap) const { return (phase + padding - tap * dilation) / stride; }
  template <typename F>
  i64 extreme(i64 length, const F& better) const {
    i64 found = 0;
    bool any = false;
    for (i64 phase = 0; phase < min(stride, length); phase++)
      for (i64 tap = 0; tap < taps; tap++)
        if (meets(phase, tap) && (!any || better(of(phase, tap), found))) any = true, found = of(phase, tap);
    return found;
  }
  i64 first(i64 length) const { return extreme(length, [](i64 a, i64 b) { return a < b; }); }
  i64 last(i64 length) const { return extreme(length, [](i64 a, i64 b) { return a > b; }); }
};

inline Reach reach_y(const Shape& s) { return {s.stride_y, s.padding_y, s.dilation_y, s.kernel_height}; }
inline Reach reach_x(const Shape& s) { return {s.stride_x, s.padding_x, s.dilation_x, s.kernel_width}; }

// The conv that the gradient of the input is, of the output's gradient, [N, C_out, oH, oW]: what it sees, and where.
inline Shape shape_of_gradient(const Shape& s) {
  const Reach y = reach_y(s), x = reach_x(s);
  Shape seen = s;
  seen.in_channels = s.out_channels;
  seen.height = s.out_height;
  seen.width = s.out_width;
  seen.stride_y = seen.stride_x = seen.dilation_y = seen.dilation_x = 1;
  seen.padding_y = -y.first(s.height);
  seen.padding_x = -x.first(s.width);
  seen.kernel_height = y.last(s.height) - y.first(s.height) + 1;
  seen.kernel_width = x.last(s.width) - x.first(s.width) + 1;
  seen.out_height = divided_up(s.height, s.stride_y);
  seen.out_width = divided_up(s.width, s.stride_x);
  seen.x_image = s.out_channels * s.pixels();
  seen.x_channel = s.pixels();
  seen.x_row = s.out_width;
  seen.x_column = 1;
  return seen;
}

// The gradient of the input, [N, C_in, H, W]: of each phase of the stride other taps meet the output's pixels.
// A kernel lies as it is mixed for it: [C_out, ld], and of an output channel, of each input channel the taps.
template <typename T, typename Layout>
std::vector<Part<T>> parts_of_gradient(const Shape& s, const Layout& layout, i64 ld) {
  const Reach reach[] = {reach_y(s), reach_x(s)};
  const i64 first_y = reach[0].first(s.height), first_x = reach[1].first(s.width);
  std::vector<Part<T>> parts;
  for (i64 phase_y = 0; phase_y < min(s.stride_y, s.height); phase_y++)
    for (i64 phase_x = 0; phase_x < min(s.stride_x, s.width); phase_x++) {
      const Grid grid{divided_up(s.height - phase_y, s.stride_y), divided_up(s.width - phase_x, s.stride_x),
                      s.height * s.width, s.stride_y * s.width, s.stride_x};
      Part<T> part{Pixels<T>(grid, layout.pitch()), phase_y * s.width + phase_x};
      for (i64 channel = 0; channel < s.group_out(); channel++)
        for (i64 tap = 0; tap < s.taps(); tap++) {
          const i64 y = tap / s.kernel_width, x = tap % s.kernel_width;
          if (reach[0].meets(phase_y, y) && reach[1].meets(phase_x, x))
            part.meet(layout, channel, reach[0].of(phase_y, y) - first_y, reach[1].of(phase_x, x) - first_x,
                      channel * ld + tap);
        }
      parts.push_back(part);
    }
  return parts;
}

}  // namespace DYCONVERT_TARGET
