// Convs of one input and one output channel per group on inputs with their channels last: a vector is that many
// channels of a pixel. Narrow maps, most of whose pixels are at an edge, are padded first; wide ones are read in place.
#pragma once
#include "depthwise/mix.h"
#include "base/transpose.h"

namespace DYCONVERT_TARGET {

// Whether a conv has a vector of channels for each pixel, in the input and in the output.
template <typename T>
inline bool takes_channels_last(const Shape& s) {
  return s.group_in() == 1 && s.group_out() == 1 && s.x_channel == 1 && s.out_channel == 1 &&
         s.in_channels >= kLanes<T>;
}

template <typename T, typename B>
class DepthwiseLast {
 public:
  explicit DepthwiseLast(const Problem<T, B>& problem)
      : problem_(problem), shape_(problem.shape), seen_(shape_), padded_(shape_.out_width <= kNarrow) {
    if (!padded_) return;
    seen_.padding_y = seen_.padding_x = 0;
    seen_.height = (seen_.out_height - 1) * seen_.stride_y + (seen_.kernel_height - 1) * seen_.dilation_y + 1;
    seen_.width = (seen_.out_width - 1) * seen_.stride_x + (seen_.kernel_width - 1) * seen_.dilation_x + 1;
    seen_.x_column = kLanes<T>;
    seen_.x_row = seen_.width * kLanes<T>;
  }

  void run() {
    const Shape& s = shape_;
    const i64 blocks = divided_up(s.in_channels, kLanes<T>);
    // A block's images one after the other, so that its part of the bank stays in cache.
    parallel(problem_.parallel_for, s.images * blocks, grain_of(kLanes<T> * s.taps() * s.pixels()),
             [&](i64 begin, i64 end) {
               static thread_local Buffer<T> buffer;
               T* plane = padded_ ? buffer.of(seen_.height * seen_.x_row) : nullptr;
               if (padded_) std::fill(plane, plane + seen_.height * seen_.x_row, T(0));
               // The last block ends with the channels.
               for (; begin < end; begin++)
                 convolve(begin % s.images, min(begin / s.images * kLanes<T>, s.in_channels - kLanes<T>), plane);
             });
  }

 private:
  static constexpr i64 kNarrow = 16;

  // Some channels of an image, with what is around it. The padding stays zero from one to the next.
  const T* pad(const T* x, T* to) const {
    const Shape& s = shape_;
    const i64 end = min(s.height, seen_.height - s.padding_y), width = min(s.width, seen_.width - s.padding_x);
    for (i64 y = 0; y < end; y++)
      for (i64 column = 0; column < width; column++)
        store(to + (y + s.padding_y) * seen_.x_row + (column + s.padding_x) * seen_.x_column,
              load(x + y * s.x_row + column * s.x_column));
    return to;
  }

  void convolve(i64 image, i64 channel, T* plane) const {
    const Shape& s = shape_;
    static thread_local Buffer<T> mixed, turned;
    T* kernels = mixed.of(kLanes<T> * s.taps());
    T* weights = turned.of(kLanes<T> * s.taps());
    mix_taps(problem_, image, channel, kLanes<T>, kernels);
    transpose(kernels, s.taps(), kLanes<T>, s.taps(), weights, kLanes<T>);
    alignas(64) T bias[kLanes<T>];
    for (i64 c = 0; c < kLanes<T>; c++) bias[c] = added(problem_, image, channel + c);
    const T* x = problem_.x + image * s.x_image + channel;
    if (padded_) x = pad(x, plane);
    T* out = problem_.out + image * s.out_channels * s.pixels() + channel;
    for (i64 y = 0; y < s.out_height; y++) convolve_row(x, weights, load(bias), y, out + y * s.out_width * s.out_pixel);
  }

  // Taps whose place in the input is one.
  struct Taps {
    i64 begin, end;
  };
  static Taps taps_inside(i64 first, i64 dilation, i64 taps, i64 length) {
    return {first < 0 ? divided_up(-first, dilation) : 0, min(taps, max<i64>(0, divided_up(length - first, dilation)))};
  }

  void convolve_row(const T* x, const T* weights, Vector<T> bias, i64 y, T* out) const {
    static constexpr decltype(&DepthwiseLast::convolve_pixels<1>) kPixels[] = {
        &DepthwiseLast::convolve_pixels<1>, &DepthwiseLast::convolve_pixels<2>, &DepthwiseLast::convolve_pixels<3>,
        &DepthwiseLast::convolve_pixels<4>, &DepthwiseLast::convolve_pixels<5>, &DepthwiseLast::convolve_pixels<6>,
        &DepthwiseLast::convolve_pixels<7>, &DepthwiseLast::convolve_pixels<8>};
    const Shape& s = seen_;
    const i64 down = y * s.stride_y - s.padding_y, reach = (s.kernel_width - 1) * s.dilation_x;
    const Taps rows = taps_inside(down, s.dilation_y, s.kernel_height, s.height);
    for (i64 at = 0, pixels; at < s.out_width; at += pixels, out += pixels * s.out_pixel) {
      const i64 right = at * s.stride_x - s.padding_x, left = s.out_width - at;
      const i64 whole = right < 0 ? 0 : divided_up(s.width - right - reach, s.stride_x);  // that have all taps
      pixels = max<i64>(1, min(divided_up(left, divided_up(left, 8)), whole));
      const Taps columns = taps_inside(right, s.dilation_x, s.kernel_width, s.width);
      (this->*kPixels[pixels - 1])(x + down * s.x_row + right * s.x_column, weights, bias, rows, columns, out);
    }
  }

  // Pixels of a row, which the same taps meet.
  template <int pixels>
  void convolve_pixels(const T* x, const T* weights, Vector<T> bias, Taps rows, Taps columns, T* out) const {
    const Shape& s = seen_;
    const i64 step = s.stride_x * s.x_column, pixel = s.out_pixel;
    Vector<T> sums[pixels];
    for (int p = 0; p < pixels; p++) sums[p] = bias;
    for (i64 row = rows.begin; row < rows.end; row++) {
      const T* from = x + row * s.dilation_y * s.x_row;
      for (i64 column = columns.begin; column < columns.end; column++) {
        const T* at = from + column * s.dilation_x * s.x_column;
        const Vector<T> weight = load(weights + (row * s.kernel_width + column) * kLanes<T>);
#pragma GCC unroll 8
        for (int p = 0; p < pixels; p++) sums[p] += weight * load(at + p * step);
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < pixels; p++) store(out + p * pixel, sums[p]);
  }

  const Problem<T, B>& problem_;
  const Shape& shape_;
  Shape seen_;  // what is convolved
  const bool padded_;
};

}  // namespace DYCONVERT_TARGET
