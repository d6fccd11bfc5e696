// A dynamic conv on a small map, with an output channel in each lane. Kernels are mixed as in `conv.h`, a vector of
// output channels at a time, and transposed while they are in cache. Taps that meet only padding are left out.
#pragma once
#include "base/mix.h"
#include "base/planes.h"
#include "base/transpose.h"
#include "direct/channel_tile.h"

namespace DYCONVERT_TARGET {

template <typename T, typename B>
class ChannelConv {
 public:
  explicit ChannelConv(const Problem<T, B>& problem)
      : problem_(problem), shape_(problem.shape), planes_(shape_, true) {
    const Shape& s = shape_;
    // More than elsewhere, so that the bank is read more rarely.
    images_ = max<i64>(1, min(s.images, 2 * kLaidOut / planes_.image));
    // With its channels last, a kernel has no neighbouring elements that are those of some channels.
    const i64 most = max<i64>(1, kPart / (kLanes<T> * s.taps()));
    channels_ = s.bank_last ? s.group_in() : divided_up(s.group_in(), divided_up(s.group_in(), most));
    ld_ = rounded_up(channels_ * s.taps(), 16) + 16;  // as in `conv.h`
    mixed_ = max<i64>(1, kMixedTogether / (kLanes<T> * ld_));
    if (mixed_ > kMixedImages) mixed_ = mixed_ / kMixedImages * kMixedImages;
    for (i64 y = 0; y < s.out_height; y++) add_tiles(y);
  }

  i64 scratch_elements() const { return planes_.scratch_elements(images_); }

  void compute() {
    const Shape& s = shape_;
    const i64 blocks = divided_up(s.group_out(), kLanes<T>);
    const i64 grain = grain_of(kLanes<T> * s.elements() * s.pixels());
    for (i64 first = 0; first < s.images; first += images_) {
      const i64 count = min(images_, s.images - first);
      const T* x = planes_.lay_out_images(problem_.x + first * s.x_image, count, problem_.scratch,
                                          problem_.parallel_for);
      parallel(problem_.parallel_for, s.groups * blocks * count, grain, [&](i64 begin, i64 end) {
        while (begin < end) {
          const i64 block = begin / count, n = begin % count, images = min(count - n, end - begin);
          convolve(x + n * planes_.image, first + n, images, block / blocks, block % blocks * kLanes<T>);
          begin += images;
        }
      });
    }
  }

 private:
  // Elements of a block's kernel at a time, and of kernels that are mixed at a time.
  static constexpr i64 kPart = 80 * 1024, kMixedTogether = 512 * 1024;

  struct Tile {
    int32_t pixel, pixels, taps, end;  // its first pixel, their number, and its taps: [taps, end)
  };

  // Microtiles of about one size, for one row of the output.
  void add_tiles(i64 y) {
    const Shape& s = shape_;
    for (i64 left = s.out_width, x = 0; left > 0;) {
      const i64 now = divided_up(left, divided_up(left, kTilePixels)), first = taps_.size();
      for (i64 tap = 0; tap < s.taps(); tap++) add_tap(y, x, now, tap);
      tiles_.push_back({int32_t(y * s.out_width + x), int32_t(now), int32_t(first), int32_t(taps_.size())});
      x += now;
      left -= now;
    }
  }

  // Padding that other pixels than the first and the last read is multiplied.
  void add_tap(i64 y, i64 x, i64 pixels, i64 tap) {
    const Shape& s = shape_;
    const i64 row = y * s.stride_y + tap / s.kernel_width * s.dilation_y - s.padding_y;
    const auto inside = [&](i64 pixel) {
      const i64 column = (x + pixel) * s.stride_x + tap % s.kernel_width * s.dilation_x - s.padding_x;
      return column >= 0 && column < s.width;
    };
    bool any = false;
    for (i64 pixel = 0; pixel < pixels; pixel++) any |= inside(pixel);
    if (row < 0 || row >= s.height || !any) return;
    const i64 offset = planes_.offset_of_tap(tap) + y * planes_.pitch() + x;
    taps_.push_back({int32_t(tap), int32_t(offset), inside(0), inside(pixels - 1)});
  }

  // A vector of output channels of a group from `row` on, or as many as there are, of some images.
  void convolve(const T* x, i64 image, i64 images, i64 group, i64 row) {
    const Shape& s = shape_;
    const i64 channel = group * s.group_out() + row, rows = min(kLanes<T>, s.group_out() - row);
    static thread_local Buffer<T> mixed, transposed, summed;
    const i64 kernel = rows * ld_, mixed_elements = min(mixed_, images) * kernel;
    T* kernels = mixed.of(mixed_elements + (kLanes<T> - rows) * ld_);
    std::fill(kernels + mixed_elements, kernels + mixed_elements + (kLanes<T> - rows) * ld_, T(0));  // read, not used
    T* weights = transposed.of(channels_ * s.taps() * kLanes<T>);
    const i64 sums_image = s.pixels() * kLanes<T>;
    T* sums = summed.of(images * sums_image);
    x += group * s.group_in() * planes_.plane;
    for (i64 first = 0; first < s.group_in(); first += channels_) {
      const i64 channels = min(channels_, s.group_in() - first);
      for (i64 n = 0; n < images; n++) {
        if (n % mixed_ == 0)
          mix(problem_, image + n, min(mixed_, images - n), channel, rows, first * s.taps(), channels * s.taps(), ld_,
              kernels);
        T* to = sums + n * sums_image;
        if (!first) start(image + n, channel, rows, to);
        transpose_kernel(kernels + n % mixed_ * kernel, channels, weights);
        for (const Tile& tile : tiles_)
          kChannelTiles<T>[tile.pixels - 1](weights, x + n * planes_.image + first * planes_.plane, planes_.plane,
                                            channels, taps_.data() + tile.taps, taps_.data() + tile.end,
                                            to + tile.pixel * kLanes<T>);
        if (first + channels == s.group_in())
          write(to, rows, problem_.out + (image + n) * s.out_channels * s.pixels() + channel * s.out_channel);
      }
    }
  }

  // Sets the sums to the biases.
  void start(i64 image, i64 channel, i64 rows, T* sums) const {
    alignas(64) T biases[kLanes<T>] = {};
    if (problem_.bias || problem_.shift)
      for (i64 m = 0; m < rows; m++) biases[m] = mixed_bias(problem_, image, channel + m);
    for (i64 p = 0; p < shape_.pixels(); p++) store(sums + p * kLanes<T>, load(biases));
  }

  // weights[tap, channel, row], from a mixed kernel's rows.
  void transpose_kernel(const T* kernel, i64 channels, T* weights) const {
    const i64 taps = shape_.taps(), length = channels * taps;
    const i64 next = shape_.bank_last ? kLanes<T> : channels * kLanes<T>;
    T* channel = weights;
    T* to = weights;
    for (i64 k = 0, tap = 0; k < length; k += 4) {
      Vector<T> columns[4];
      load_columns(kernel + k, ld_, columns);
      for (i64 j = 0; j < 4 && k + j < length; j++) {
        store(to, columns[j]);
        to += next;
        if (shape_.bank_last || ++tap < taps) continue;  // with its channels last, it has this order
        tap = 0;
        to = channel += kLanes<T>;
      }
    }
  }

  void write(const T* sums, i64 rows, T* out) const {
    const Shape& s = shape_;
    if (s.out_pixel == 1)
      transpose(sums, kLanes<T>, s.pixels(), rows, out, s.out_channel);
    else
      for (i64 p = 0; p < s.pixels(); p++) copy(out + p * s.out_pixel, sums + p * kLanes<T>, rows);
  }

  const Problem<T, B>& problem_;
  const Shape& shape_;
  const Planes<T> planes_;
  std::vector<Tile> tiles_;
  std::vector<TileTap> taps_;
  i64 images_, channels_, mixed_;  // at a time: images laid out, input channels, images whose kernels are mixed
  i64 ld_;                         // from row to row of a mixed kernel
};

}  // namespace DYCONVERT_TARGET
