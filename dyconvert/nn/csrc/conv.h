// A dynamic conv: parts of a kernel are mixed and used while they are in cache, so that no image's kernel is ever
// written to memory and the bank is read once.
#pragma once
#include "mix.h"
#include "multiply.h"
#include "panels.h"
#include "planes.h"

namespace dyconvert {

// Elements of a row of a kernel at a time, so that what they read of the input stays in the innermost cache.
constexpr i64 kDepth = 256;
// Output channels at a time: the more, the fewer times the input is read; but the elements of their kernels should
// stay in a core's own cache.
constexpr i64 kRows = 64, kFewRows = 16;
constexpr i64 kKernel = 40 * 1024;
// Elements of kernels that are mixed at a time, for as many images as that is: what stays in the outer caches.
constexpr i64 kKernels = 512 * 1024;
// Elements of planes at a time: what stays in the outermost cache.
constexpr i64 kPlanes = 1024 * 1024;

// A bank's output channels in blocks, of one size as far as possible, as many as the threads can share evenly.
inline i64 rows_together(const Shape& s, i64 images) {
  const i64 channels = s.group_out(), most = max(kFewRows, min(kRows, kKernel / s.elements()));
  i64 blocks = divided_up(channels, most);
  const i64 others = s.groups * images;
  if (others < 4 * s.threads) blocks = rounded_up(blocks * others, s.threads) / others;
  blocks = max<i64>(blocks, others < s.threads ? divided_up(s.threads, others) : 1);
  return min(channels, rounded_up(divided_up(channels, blocks), 4));
}

// Layout: `Planes`, or `Panels` for 1 x 1 convs.
template <typename T, typename B, template <typename> class Layout>
class Conv {
 public:
  explicit Conv(const Problem<T, B>& problem)
      : problem_(problem), shape_(problem.shape), layout_(shape_) {
    images_ = max<i64>(1, min(shape_.images, kPlanes / layout_.image));
    rows_ = rows_together(shape_, images_);
    // Rows a line of the cache further apart than they are long, or their lengths, often powers of two, would have
    // them share the cache's few places.
    lda_ = rounded_up(shape_.elements(), 16) + 16;
    kernels_ = max<i64>(1, kKernels / (rows_ * lda_));
  }

  i64 scratch_elements() const { return layout_.scratch_elements(images_); }

  void run() {
    const i64 blocks = divided_up(shape_.group_out(), rows_);
    for (i64 first = 0; first < shape_.images; first += images_) {
      const i64 count = min(images_, shape_.images - first);
      const T* x = problem_.scratch;
      layout_.lay_out_images(problem_.x + first * shape_.x_image, count, problem_.scratch, problem_.parallel_for);
      const i64 grain = grain_of(rows_ * shape_.elements() * shape_.pixels());
      parallel(problem_.parallel_for, shape_.groups * blocks * count, grain, [&](i64 begin, i64 end) {
        while (begin < end) {
          const i64 block = begin / count, n = begin % count, images = min(count - n, end - begin);
          const i64 row = block % blocks * rows_;
          convolve(x + n * layout_.image, first + n, images, block / blocks, row,
                   min(rows_, shape_.group_out() - row));
          begin += images;
        }
      });
    }
  }

 private:
  // `rows` output channels of a group, of some images.
  void convolve(const T* x, i64 image, i64 images, i64 group, i64 row, i64 rows) {
    const Shape& s = shape_;
    const i64 channel = group * s.group_out() + row;
    static thread_local Buffer<T> mixed, biases;
    T* kernels = mixed.of(min(kernels_, images) * rows_ * lda_);
    T* bias = biases.of(rows_);
    for (i64 n = 0; n < images; n++) {
      if (n % kernels_ == 0) mix(problem_, image + n, min(kernels_, images - n), channel, rows, lda_, kernels);
      for (i64 m = 0; m < rows; m++) bias[m] = added(problem_, image + n, channel + m);
      T* out = problem_.out + (image + n) * s.out_channels * s.pixels() + channel * s.out_channel;
      multiply_image(kernels + n % kernels_ * rows * lda_, rows, x + n * layout_.image, group * s.group_in(), bias, out);
    }
  }

  // One image's kernel [rows, K] times the input's channels from `channel` on.
  void multiply_image(const T* kernel, i64 rows, const T* x, i64 channel, const T* bias, T* out) {
    alignas(64) T sums[(kRows * kStrip + 1) * kLanes<T>];
    const Pixels<T>& pixels = layout_.pixels;
    for (i64 first = 0; first < pixels.vectors(); first += kStrip) {
      const i64 strip = min(kStrip, pixels.vectors() - first);
      pixels.prefetch(rows, first, strip, out);
      for (i64 v = 0; v < strip;) {
        const int together = vectors_together(strip - v);
        multiply_vectors(kernel, rows, x, channel, first + v, together, sums + v * kLanes<T>, strip * kLanes<T>);
        v += together;
      }
      pixels.write(sums, rows, first, strip, bias, out);
    }
  }

  void multiply_vectors(const T* kernel, i64 rows, const T* x, i64 channel, i64 v, int together, T* sums, i64 ld) {
    const T* from[kTogether];
    layout_.locate(x, channel, v, together, from);
    const int32_t* offsets = layout_.offsets(together);
    for (i64 k = 0; k < shape_.elements(); k += kDepth)
      multiply(kernel + k, lda_, rows, from, together, offsets + k, min(kDepth, shape_.elements() - k), sums, ld, k > 0);
  }

  const Problem<T, B>& problem_;
  const Shape& shape_;
  const Layout<T> layout_;
  i64 images_, rows_, kernels_;  // at a time: images in planes, output channels, images' kernels
  i64 lda_;                      // from row to row of a kernel
};

}  // namespace dyconvert
