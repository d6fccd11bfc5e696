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
// Output channels at a time: the most, and the elements of their kernels, which stay in a core's own cache.
constexpr i64 kRows = 32;
constexpr i64 kKernel = 80 * 1024;
// Elements of kernels that are mixed at a time, for as many images as that is: what stays in the outer caches.
constexpr i64 kKernels = 512 * 1024;
// Elements of planes at a time: what stays in the outermost cache.
constexpr i64 kPlanes = 1024 * 1024;

// A bank's output channels in blocks, of one size as far as possible, as many as the threads can share evenly.
inline i64 rows_together(const Shape& s, i64 images) {
  const i64 channels = s.group_out(), most = max<i64>(8, min(kRows, kKernel / s.elements() / 4 * 4));
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
      parallel(problem_.parallel_for, shape_.groups * blocks * count, 1, [&](i64 begin, i64 end) {
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
    alignas(64) T sums[kRows * kTogether * kLanes<T>];
    const Pixels<T>& pixels = layout_.pixels;
    for (i64 v = 0; v < pixels.vectors();) {
      const int together = vectors_together(pixels.vectors() - v);
      const i64 width = together * kLanes<T>;
      pixels.prefetch(rows, v, together, out);
      const T* from[kTogether];
      layout_.locate(x, channel, v, together, from);
      const int32_t* offsets = layout_.offsets(together);
      for (i64 k = 0; k < shape_.elements(); k += kDepth)
        multiply(kernel + k, lda_, rows, from, together, offsets + k, min(kDepth, shape_.elements() - k), sums, width,
                 k > 0);
      pixels.write(sums, width, rows, v, together, bias, out);
      v += together;
    }
  }

  const Problem<T, B>& problem_;
  const Shape& shape_;
  const Layout<T> layout_;
  i64 images_, rows_, kernels_;  // at a time: images in planes, output channels, images' kernels
  i64 lda_;                      // from row to row of a kernel
};

}  // namespace dyconvert
