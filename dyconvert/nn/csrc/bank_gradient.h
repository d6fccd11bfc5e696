// The gradients of a conv's bank and coefficients. Each image's kernel has a gradient; it is made in parts, and reduced
// while in cache.
#pragma once
#include "multiply.h"
#include "planes.h"
#include "reduce.h"
#include "transpose.h"

namespace dyconvert {

template <typename T>
class BankGradient {
 public:
  explicit BankGradient(const Gradients<T>& to)
      : to_(to), shape_(to.shape), planes_(shape_), ldc_(rounded_up(shape_.in_channels, kLanes<T>) + kLanes<T>) {
    const Shape& s = shape_;
    image_ = planes_.plane * ldc_;
    images_ = max<i64>(1, min(s.images, kElements / image_));
    rows_ = min(s.group_out(), s.taps() == 1 ? kPointwiseRows : kRows);
    lanes_ = min(rounded_up(s.group_in(), kLanes<T>), (s.taps() == 1 ? 4 : 1) * kTogether * kLanes<T>);
    const i64 blocks = s.groups * divided_up(s.group_out(), rows_), chunks = divided_up(s.group_in(), lanes_);
    ranges_ = min(chunks, divided_up(4 * s.threads, blocks));
    parts_ = min(images_, divided_up(4 * s.threads, blocks * ranges_));
    for (i64 y = 0; y < s.out_height; y++)
      for (i64 x = 0; x < s.out_width; x++) {
        steps_.push_back(steps_.size());
        offsets_.push_back((y * planes_.pitch() + x) * ldc_);
      }
  }

  void run() {
    const Shape& s = shape_;
    static thread_local Buffer<T> scratch, partial;
    T* x = scratch.of(images_ * image_);
    T* banks = to_.grad_bank && parts_ > 1 ? partial.of((parts_ - 1) * s.g * to_.expert()) : nullptr;
    const i64 blocks = divided_up(s.group_out(), rows_), sets = s.groups * blocks;
    const i64 slots = to_.per() == 1 ? sets * ranges_ : ranges_;
    std::vector<T> etas(slots * s.images * s.g * to_.per());
    for (i64 first = 0; first < s.images; first += images_) {
      const i64 count = min(images_, s.images - first);
      const i64 parts = min(parts_, count);  // where the last images are fewer, the other parts keep what they have
      lay_out(to_.x + first * s.x_image, count, x);
      parallel(to_.parallel_for, sets * ranges_ * parts, 1, [&](i64 begin, i64 end) {
        for (; begin < end; begin++) {
          const i64 part = begin % parts, range = begin / parts % ranges_, set = begin / parts / ranges_;
          const i64 slot = to_.per() == 1 ? set * ranges_ + range : range;
          const i64 from = count * part / parts, images = count * (part + 1) / parts - from;
          T* bank = !to_.grad_bank ? nullptr : part ? banks + (part - 1) * s.g * to_.expert() : to_.grad_bank;
          const i64 row = set % blocks * rows_;
          block(x + from * image_, first + from, images, set / blocks, row, min(rows_, s.group_out() - row), range, bank,
                etas.data() + slot * s.images * s.g * to_.per(), first > 0);
        }
      });
    }
    if (banks) sum_parts(to_.parallel_for, banks, parts_ - 1, s.g * to_.expert(), true, to_.grad_bank);
    if (to_.grad_eta) sum_parts(to_.parallel_for, etas.data(), slots, s.images * s.g * to_.per(), false, to_.grad_eta);
  }

 private:
  // Output channels at a time, and for 1 x 1 convs, whose rows are short.
  static constexpr i64 kRows = 16, kPointwiseRows = 48;
  // Pixels at a time, so that what they read of the input stays in the innermost cache.
  static constexpr i64 kPixels = 256;
  // Elements of the input that are laid out at a time: what stays in the outermost cache.
  static constexpr i64 kElements = 1024 * 1024;

  // Planes with their channels last: a pixel's channels make vectors.
  void lay_out(const T* x, i64 images, T* to) const {
    const Shape& s = shape_;
    constexpr i64 together = 8;
    const i64 blocks = divided_up(s.in_channels, together);
    const bool in_place = planes_.in_place();
    parallel(to_.parallel_for, images * blocks, max<i64>(1, 8192 / (planes_.plane * together)), [&](i64 begin, i64 end) {
      static thread_local Buffer<T> buffer;
      T* planes = buffer.of(together * planes_.plane);
      planes_.clear(planes, together);
      for (; begin < end; begin++) {
        const i64 n = begin / blocks, first = begin % blocks * together, channels = min(together, s.in_channels - first);
        const T* from = x + n * s.x_image + first * s.x_channel;
        if (!in_place)
          for (i64 c = 0; c < channels; c++) planes_.lay_out(from + c * s.x_channel, 1, planes + c * planes_.plane);
        transpose(in_place ? from : planes, planes_.plane, channels, planes_.plane, to + n * image_ + first, ldc_);
      }
    });
  }

  // The gradients of `rows` output channels of a group, and a range of its input channels, from some images.
  void block(const T* x, i64 image, i64 images, i64 group, i64 row, i64 rows, i64 range, T* grad_bank, T* grad_eta,
             bool add) {
    const Shape& s = shape_;
    const i64 taps = s.taps(), chunks = divided_up(s.group_in(), lanes_), channel = group * s.group_out() + row;
    static thread_local Buffer<T> products, gradients;
    T* product = products.of(taps * rows_ * lanes_);
    T* kernels = gradients.of(kReduced * rows_ * lanes_ * taps);
    for (i64 chunk = chunks * range / ranges_; chunk < chunks * (range + 1) / ranges_; chunk++) {
      const i64 c = chunk * lanes_, channels = min(lanes_, s.group_in() - c);
      const i64 lanes = rounded_up(channels, kLanes<T>), ld = taps == 1 ? lanes : channels * taps;
      for (i64 n = 0; n < images; n += kReduced) {
        const i64 now = min(kReduced, images - n);
        for (i64 j = 0; j < now; j++) {
          T* kernel = kernels + j * rows * ld;
          T* to = taps == 1 ? kernel : product;
          multiply_image(to_.grad + ((image + n + j) * s.out_channels + channel) * s.pixels(), rows,
                         x + (n + j) * image_ + group * s.group_in() + c, lanes, to);
          if (taps > 1)
            for (i64 m = 0; m < rows; m++)
              for (i64 tap = 0; tap < taps; tap++)
                for (i64 at = 0; at < channels; at++)
                  kernel[m * ld + at * taps + tap] = product[(tap * rows + m) * lanes + at];
        }
        reduce(to_, image + n, now, channel, rows, c * taps, channels * taps, ld, kernels, grad_bank, grad_eta,
               add || n);
      }
    }
  }

  // For each tap, the output's gradient [rows, pixels] times the pixels that it meets [pixels, lanes]: to[taps, rows, lanes].
  void multiply_image(const T* grad, i64 rows, const T* x, i64 lanes, T* to) const {
    const Shape& s = shape_;
    const i64 pixels = s.pixels(), vectors = lanes / kLanes<T>;
    for (i64 pixel = 0; pixel < pixels; pixel += kPixels)
      for (i64 v = 0; v < vectors;) {
        const int together = vectors_together(vectors - v);
        for (i64 tap = 0; tap < s.taps(); tap++) {
          const i64 y = tap / s.kernel_width * s.dilation_y, column = tap % s.kernel_width * s.dilation_x;
          const T* from[kTogether];
          for (int j = 0; j < together; j++) from[j] = x + planes_.offset(0, y, column, 1) * ldc_ + (v + j) * kLanes<T>;
          multiply(grad, pixels, rows, steps_.data() + pixel, from, together, offsets_.data() + pixel,
                   min(kPixels, pixels - pixel), to + tap * rows * lanes + v * kLanes<T>, lanes, pixel > 0);
        }
        v += together;
      }
  }

  const Gradients<T>& to_;
  const Shape& shape_;
  const Planes<T> planes_;
  const i64 ldc_;          // from pixel to pixel
  i64 image_, images_;     // elements of an image laid out, and images laid out at a time
  i64 rows_, lanes_;       // at a time: output channels, and vectors' elements of input channels
  i64 ranges_, parts_;     // into which the input channels and the images are split for threads
  std::vector<int32_t> steps_, offsets_;  // of the output's pixels, in its gradient and in what is laid out
};

}  // namespace dyconvert
