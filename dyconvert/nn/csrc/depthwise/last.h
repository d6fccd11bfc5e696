// Convs of one input and one output channel per group on inputs with channels last: a vector has that many channels of
// one pixel. Narrow maps, most of whose pixels are at an edge, are padded first; wide maps are read in place.
#pragma once
#include "depthwise/mix.h"
#include "base/transpose.h"

namespace DYCONVERT_TARGET {

// Whether a pixel has at least one vector of channels that lie one behind the other, in the input and in the output.
template <typename T>
inline bool takes_channels_last(const Shape& s) {
  return s.group_in() == 1 && s.group_out() == 1 && s.x_channel == 1 && s.out_channel == 1 &&
         s.in_channels >= kLanes<T>;
}

template <typename T, typename B>
class DepthwiseLast {
 public:
  explicit DepthwiseLast(const Problem<T, B>& problem)
      : problem_(problem), shape_(problem.shape), conv_shape_(shape_), padded_(shape_.out_width <= kNarrow) {
    if (!padded_) return;
    conv_shape_.padding_y = conv_shape_.padding_x = 0;
    const Shape& s = shape_;
    conv_shape_.height = (s.out_height - 1) * s.stride_y + (s.kernel_height - 1) * s.dilation_y + 1;
    conv_shape_.width = (s.out_width - 1) * s.stride_x + (s.kernel_width - 1) * s.dilation_x + 1;
    conv_shape_.x_column = kLanes<T>;
    conv_shape_.x_row = conv_shape_.width * kLanes<T>;
  }

  void compute() {
    const Shape& s = shape_;
    const i64 blocks = divided_up(s.in_channels, kLanes<T>);
    // All images of a block of channels, one after the other: so the block's weights stay in cache.
    parallel(problem_.parallel_for, s.images * blocks, grain_of(kLanes<T> * s.taps() * s.pixels()),
             [&](i64 begin, i64 end) {
               static thread_local Buffer<T> buffer;
               T* plane = padded_ ? buffer.of(conv_shape_.height * conv_shape_.x_row) : nullptr;
               if (padded_) std::fill(plane, plane + conv_shape_.height * conv_shape_.x_row, T(0));
               // The last block ends with the channels.
               for (; begin < end; begin++)
                 convolve(begin % s.images, min(begin / s.images * kLanes<T>, s.in_channels - kLanes<T>), plane);
             });
  }

 private:
  static constexpr i64 kNarrow = 16;

  // Copies a vector of channels of an image into a padded map, whose padding stays zero from image to image.
  const T* pad(const T* x, T* to) const {
    const Shape& s = shape_;
    const i64 end = min(s.height, conv_shape_.height - s.padding_y);
    const i64 width = min(s.width, conv_shape_.width - s.padding_x);
    for (i64 y = 0; y < end; y++)
      for (i64 column = 0; column < width; column++)
        store(to + (y + s.padding_y) * conv_shape_.x_row + (column + s.padding_x) * conv_shape_.x_column,
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
    for (i64 c = 0; c < kLanes<T>; c++) bias[c] = mixed_bias(problem_, image, channel + c);
    const T* x = problem_.x + image * s.x_image + channel;
    if (padded_) x = pad(x, plane);
    T* out = problem_.out + image * s.out_channels * s.pixels() + channel;
    for (i64 y = 0; y < s.out_height; y++) convolve_row(x, weights, load(bias), y, out + y * s.out_width * s.out_pixel);
  }

  // Taps that read inside the input, of a row or column of them.
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
    const Shape& s = conv_shape_;
    const i64 down = y * s.stride_y - s.padding_y, reach = (s.kernel_width - 1) * s.dilation_x;
    const Taps rows = taps_inside(down, s.dilation_y, s.kernel_height, s.height);
    for (i64 at = 0, pixels; at < s.out_width; at += pixels, out += pixels * s.out_pixel) {
      const i64 right = at * s.stride_x - s.padding_x, left = s.out_width - at;
      const i64 whole = right < 0 ? 0 : divided_up(s.width - right - reach, s.stride_x);  // pixels with all taps
      pixels = max<i64>(1, min(divided_up(left, divided_up(left, 8)), whole));
      const Taps columns = taps_inside(right, s.dilation_x, s.kernel_width, s.width);
      (this->*kPixels[pixels - 1])(x + down * s.x_row + right * s.x_column, weights, bias, rows, columns, out);
    }
  }

  // Computes neighbouring pixels of a row, all with the same taps inside the input.
  template <int pixels>
  void convolve_pixels(const T* x, const T* weights, Vector<T> bias, Taps rows, Taps columns, T* out) const {
    const Shape& s = conv_shape_;
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
  Shape conv_shape_;  // the conv that is computed: of the padded map, if it is padded
  const bool padded_;
};

}  // namespace DYCONVERT_TARGET
