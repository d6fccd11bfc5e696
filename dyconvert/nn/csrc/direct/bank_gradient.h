// The gradients of a conv's bank and coefficients. Each image's kernel has a gradient; it is made in parts, and reduced
// while in cache.
#pragma once
#include "direct/pixel_products.h"
#include "base/reduce.h"
#include "winograd/tile_products.h"

namespace DYCONVERT_TARGET {

// Products: `PixelProducts`, or `TileProducts` where Winograd's filtering pays.
template <typename T, template <typename> class Products>
class BankGradient {
 public:
  explicit BankGradient(const Gradients<T>& to)
      : to_(to),
        shape_(to.shape),
        panels_(divided_up(shape_.group_in(), kTogether * kLanes<T>)),
        width_(rounded_up(divided_up(shape_.group_in(), panels_), kLanes<T>)),
        products_(shape_, width_),
        image_(shape_.groups * panels_ * products_.panel()) {
    const Shape& s = shape_;
    // The bank and its gradient are gone through once for all images that are laid out together.
    const i64 together = max(kLaidOut, 2 * s.g * to.expert()) / (image_ + products_.grad_elements());
    images_ = divided_up(s.images, divided_up(s.images, max<i64>(1, together)));
    rows_ = min(s.group_out(), s.taps() == 1 ? kPointwiseRows : kRows);
    lanes_ = min(panels_, s.taps() == 1 ? kPointwisePanels : 1) * width_;
    const i64 blocks = s.groups * divided_up(s.group_out(), rows_), chunks = divided_up(s.group_in(), lanes_);
    ranges_ = min(chunks, divided_up(4 * s.threads, blocks));
    parts_ = min(images_, divided_up(4 * s.threads, blocks * ranges_));
  }

  void run() {
    const Shape& s = shape_;
    static thread_local Buffer<T> partial;
    T* x = scratch<T>().of(images_ * (image_ + products_.grad_elements()));
    T* grads = x + images_ * image_;
    T* banks = to_.grad_bank && parts_ > 1 ? partial.of((parts_ - 1) * s.g * to_.expert()) : nullptr;
    const i64 blocks = divided_up(s.group_out(), rows_), sets = s.groups * blocks;
    const i64 slots = to_.per() == 1 ? sets * ranges_ : ranges_;
    std::vector<T> etas(slots * s.images * s.g * to_.per());
    // Blocks of output channels add up to the same factors: those of a group, or all.
    const i64 factor_slots = s.factor_groups > 1 ? blocks : sets;
    std::vector<T> factors(to_.grad_factors ? factor_slots * to_.all_factors() : 0);
    for (i64 first = 0; first < s.images; first += images_) {
      const i64 count = min(images_, s.images - first);
      const i64 parts = min(parts_, count);  // where the last images are fewer, the other parts keep what they have
      lay_out(to_.x + first * s.x_image, count, x);
      products_.lay_out_grad(to_.grad + first * s.out_channels * s.pixels(), count, grads, to_.parallel_for);
      parallel(to_.parallel_for, sets * ranges_ * parts, 1, [&](i64 begin, i64 end) {
        for (; begin < end; begin++) {
          const i64 part = begin % parts, range = begin / parts % ranges_, set = begin / parts / ranges_;
          const i64 slot = to_.per() == 1 ? set * ranges_ + range : range;
          const i64 from = count * part / parts, images = count * (part + 1) / parts - from;
          T* bank = !to_.grad_bank ? nullptr : part ? banks + (part - 1) * s.g * to_.expert() : to_.grad_bank;
          const i64 row = set % blocks * rows_;
          block(x + from * image_, grads + from * products_.grad_elements(), first + from, images, set / blocks, row, min(rows_, s.group_out() - row), range, bank,
                etas.data() + slot * s.images * s.g * to_.per(),
                to_.grad_factors ? factors.data() + set % factor_slots * to_.all_factors() : nullptr, first > 0);
        }
      });
    }
    if (banks) sum_parts(to_.parallel_for, banks, parts_ - 1, s.g * to_.expert(), true, to_.grad_bank);
    if (to_.grad_eta) sum_parts(to_.parallel_for, etas.data(), slots, s.images * s.g * to_.per(), false, to_.grad_eta);
    if (to_.grad_factors)
      sum_parts(to_.parallel_for, factors.data(), factor_slots, to_.all_factors(), false, to_.grad_factors);
  }

 private:
  // Output channels at a time, and for 1 x 1 convs, whose rows are short.
  static constexpr i64 kRows = 16, kPointwiseRows = 48;
  // Panels at a time for 1 x 1 convs, likewise.
  static constexpr i64 kPointwisePanels = 4;
  // Panels of a few channels: [groups, panels, ...].
  void lay_out(const T* x, i64 images, T* to) const {
    const Shape& s = shape_;
    constexpr i64 together = kLanes<T>;
    const i64 blocks = divided_up(s.group_in(), together), all = s.groups * blocks;
    const i64 grain = grain_of(8 * products_.panel() * together / width_);
    parallel(to_.parallel_for, images * all, grain, [&](i64 begin, i64 end) {
      for (; begin < end; begin++) {
        const i64 n = begin / all, group = begin / blocks % s.groups, first = begin % blocks * together;
        const T* from = x + n * s.x_image + (group * s.group_in() + first) * s.x_channel;
        T* panel = to + n * image_ + (group * panels_ + first / width_) * products_.panel();
        products_.lay_out(from, min(together, s.group_in() - first), panel + first % width_);
      }
    });
  }

  // The gradients of `rows` output channels of a group, and a range of its input channels, from some images.
  void block(const T* x, const T* grads, i64 image, i64 images, i64 group, i64 row, i64 rows, i64 range, T* grad_bank,
             T* grad_eta, T* grad_factors, bool add) {
    const Shape& s = shape_;
    const i64 taps = s.taps(), chunks = divided_up(s.group_in(), lanes_), channel = group * s.group_out() + row;
    static thread_local Buffer<T> products, gradients, part;
    T* product = products.of(taps * rows_ * lanes_);
    T* kernels = gradients.of(kReduced * rows_ * lanes_ * taps);
    for (i64 chunk = chunks * range / ranges_; chunk < chunks * (range + 1) / ranges_; chunk++) {
      const i64 c = chunk * lanes_, channels = min(lanes_, s.group_in() - c), length = channels * taps;
      const i64 ld = taps == 1 ? rounded_up(channels, width_) : length;
      const i64 at = channel * s.elements() + c * taps;
      const BankPart<T> there{to_.bank + at, grad_bank ? grad_bank + at : nullptr, s.elements(), to_.expert()};
      // What is read for one image after the other is brought together: where it lies, its rows share the cache's
      // few places.
      const bool bring = images > kReduced;
      T* own = bring ? part.of(2 * s.g * rows * length) : nullptr;
      const BankPart<T> here = bring ? BankPart<T>{own, grad_bank ? own + s.g * rows * length : nullptr, length, rows * length}
                                     : there;
      if (bring) {
        copy_part(there.bank, there, own, here, rows, length);
        if (grad_bank && add) copy_part(there.grad, there, here.grad, here, rows, length);
      }
      for (i64 n = 0; n < images; n += kReduced) {
        const i64 now = min(kReduced, images - n);
        for (i64 j = 0; j < now; j++) {
          T* kernel = kernels + j * rows * ld;
          T* to = taps == 1 ? kernel : product;
          products_.multiply_image(to_.grad + (image + n + j) * s.out_channels * s.pixels(),
                                   grads + (n + j) * products_.grad_elements(), channel, rows,
                                   x + (n + j) * image_ + (group * panels_ + c / width_) * products_.panel(),
                                   rounded_up(channels, width_), to);
          if (taps > 1)
            for (i64 m = 0; m < rows; m++)
              transpose(product + m * width_, rows * width_, taps, channels, kernel + m * ld, taps);
        }
        reduce(to_, image + n, now, channel, rows, c * taps, length, ld, kernels, here, grad_eta, grad_factors,
               add || n);
      }
      if (bring && grad_bank) copy_part(here.grad, here, there.grad, there, rows, length);
    }
  }

  void copy_part(const T* from, const BankPart<T>& from_part, T* to, const BankPart<T>& to_part, i64 rows, i64 length) const {
    for (i64 i = 0; i < shape_.g; i++)
      for (i64 row = 0; row < rows; row++)
        memcpy(to + i * to_part.expert + row * to_part.row, from + i * from_part.expert + row * from_part.row,
               length * sizeof(T));
  }

  const Gradients<T>& to_;
  const Shape& shape_;
  const i64 panels_, width_;  // of a group, and channels of one
  const Products<T> products_;
  const i64 image_;            // elements of the input's, laid out
  i64 images_;                 // laid out at a time
  i64 rows_, lanes_;           // at a time: output channels, and vectors' elements of input channels
  i64 ranges_, parts_;         // into which the input channels and the images are split for threads
};

}  // namespace DYCONVERT_TARGET
