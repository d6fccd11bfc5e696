// A dynamic conv, and the gradient of its input, which is a conv of the output's gradient. Parts of a kernel are mixed
// and used while they are in cache, so that no image's kernel is ever written to memory and the bank is read once.
#pragma once
#include "mix.h"
#include "panels.h"
#include "parts.h"
#include "planes.h"

namespace dyconvert {

// Elements of a row of a kernel at a time, so that what they read of the input stays in the innermost cache.
constexpr i64 kDepth = 256;
// Channels of the result at a time: the more, the fewer times what they are made of is read; but the elements of their
// kernels should stay in a core's own cache.
constexpr i64 kRows = 64, kFewRows = 16;
constexpr i64 kKernel = 40 * 1024;
// Elements of kernels that are mixed at a time, for as many images as that is: what stays in the outer caches.
constexpr i64 kKernels = 512 * 1024;

// Channels of the result in blocks, of one size as far as possible, as many as the threads can share evenly.
// elements: of the kernel of one of them.
inline i64 rows_together(const Shape& s, i64 channels, i64 elements, i64 images) {
  const i64 most = max(kFewRows, min(kRows, kKernel / elements));
  i64 blocks = divided_up(channels, most);
  const i64 others = s.groups * images;
  if (others < 4 * s.threads) blocks = rounded_up(blocks * others, s.threads) / others;
  blocks = max<i64>(blocks, others < s.threads ? divided_up(s.threads, others) : 1);
  return min(channels, rounded_up(divided_up(channels, blocks), 4));
}

// Layout: `Planes`, or `Panels` for 1 x 1 convs. gradient: of the input, of which the problem's x is the output's
// gradient, and its out the result.
template <typename T, typename B, template <typename> class Layout, bool gradient>
class Conv {
 public:
  explicit Conv(const Problem<T, B>& problem)
      : problem_(problem), shape_(problem.shape), seen_(gradient ? shape_of_gradient(shape_) : shape_), layout_(seen_) {
    images_ = max<i64>(1, min(shape_.images, kLaidOut / layout_.image));
    group_ = gradient ? shape_.group_in() : shape_.group_out();
    channel_ = gradient ? shape_.height * shape_.width : shape_.out_channel;
    image_ = gradient ? shape_.in_channels * channel_ : shape_.out_channels * shape_.pixels();
    const i64 elements = seen_.in_channels / shape_.groups * shape_.taps();
    rows_ = rows_together(shape_, group_, elements, images_);
    // Rows a line of the cache further apart than they are long, or their lengths, often powers of two, would have
    // them share the cache's few places.
    ld_ = gradient ? rows_ * shape_.taps() : rounded_up(elements, 16) + 16;
    kernel_ = gradient ? shape_.group_out() * ld_ : rows_ * ld_;
    kernels_ = max<i64>(1, kKernels / kernel_);
    if constexpr (gradient)
      parts_ = parts_of_gradient<T>(shape_, layout_, ld_);
    else
      parts_ = parts_of_conv<T>(shape_, layout_);
  }

  i64 scratch_elements() const { return layout_.scratch_elements(images_); }

  void run() {
    const i64 blocks = divided_up(group_, rows_);
    for (i64 first = 0; first < shape_.images; first += images_) {
      const i64 count = min(images_, shape_.images - first);
      const T* x = problem_.scratch;
      layout_.lay_out_images(problem_.x + first * seen_.x_image, count, problem_.scratch, problem_.parallel_for);
      const i64 grain = grain_of(rows_ * shape_.elements() * shape_.pixels());
      parallel(problem_.parallel_for, shape_.groups * blocks * count, grain, [&](i64 begin, i64 end) {
        while (begin < end) {
          const i64 block = begin / count, n = begin % count, images = min(count - n, end - begin);
          const i64 row = block % blocks * rows_;
          convolve(x + n * layout_.image, first + n, images, block / blocks, row, min(rows_, group_ - row));
          begin += images;
        }
      });
    }
  }

 private:
  // `rows` channels of the result, in a group, of some images.
  void convolve(const T* x, i64 image, i64 images, i64 group, i64 row, i64 rows) {
    const Shape& s = shape_;
    const i64 channel = group * group_ + row;
    static thread_local Buffer<T> mixed, biases;
    T* kernels = mixed.of(min(kernels_, images) * kernel_);
    T* bias = biases.of(rows_);
    std::fill(bias, bias + rows, T(0));
    T* out = problem_.out + image * image_ + channel * channel_;
    for (i64 n = 0; n < images; n++) {
      if (n % kernels_ == 0) {
        const i64 now = min(kernels_, images - n);
        if constexpr (gradient)
          mix(problem_, image + n, now, group * s.group_out(), s.group_out(), row * s.taps(), rows * s.taps(), ld_,
              kernels);
        else
          mix(problem_, image + n, now, channel, rows, 0, s.elements(), ld_, kernels);
      }
      if constexpr (!gradient)
        for (i64 m = 0; m < rows; m++) bias[m] = added(problem_, image + n, channel + m);
      const T* kernel = kernels + n % kernels_ * (gradient ? s.group_out() : rows) * ld_;
      for (const Part<T>& part : parts_)
        multiply_image(part, kernel, rows, x + n * layout_.image, group * (seen_.in_channels / s.groups), bias,
                       out + part.at);
      out += image_;
    }
  }

  // One image's kernel times what is laid out of it, from `channel` on.
  void multiply_image(const Part<T>& part, const T* kernel, i64 rows, const T* x, i64 channel, const T* bias, T* out) {
    alignas(64) T sums[(kRows * kStrip + 1) * kLanes<T>];
    const i64 vectors = part.pixels.vectors();
    for (i64 first = 0; first < vectors; first += kStrip) {
      const i64 strip = min(kStrip, vectors - first);
      part.pixels.prefetch(rows, first, strip, out);
      if (!part.elements()) std::fill(sums, sums + rows * strip * kLanes<T>, T(0));
      for (i64 v = 0; v < strip;) {
        const int together = together_from(first + v, vectors);
        multiply_vectors(part, kernel, rows, x, channel, first + v, together, sums + v * kLanes<T>, strip * kLanes<T>);
        v += together;
      }
      part.pixels.write(sums, rows, first, strip, bias, out);
    }
  }

  void multiply_vectors(const Part<T>& part, const T* kernel, i64 rows, const T* x, i64 channel, i64 v, int together,
                        T* sums, i64 ld) {
    const T* from[kTogether];
    layout_.locate(x, channel, part.pixels, v, together, from);
    const int32_t* offsets = part.offsets(together);
    for (i64 k = 0; k < part.elements(); k += kDepth)
      multiply(kernel, gradient ? shape_.taps() : ld_, rows, part.steps.data() + k, from, together, offsets + k,
               min(kDepth, part.elements() - k), sums, ld, k > 0);
  }

  const Problem<T, B>& problem_;
  const Shape& shape_;
  const Shape seen_;  // what is laid out, and convolved
  const Layout<T> layout_;
  std::vector<Part<T>> parts_;
  i64 group_;                    // channels of the result in a group
  i64 channel_, image_;          // strides of the result
  i64 images_, rows_, kernels_;  // at a time: images laid out, channels of the result, images' kernels
  i64 ld_, kernel_;              // elements from row to row of a mixed kernel, and of all of it
};

}  // namespace dyconvert
