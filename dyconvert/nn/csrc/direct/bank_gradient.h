// The gradients of a conv's bank and coefficients. The gradient of each image's kernel is computed for a few output and
// input channels at a time, and reduced to these two while it is in cache.
#pragma once
#include "direct/pixel_products.h"
#include "base/reduce.h"
#include "winograd/tile_products.h"

namespace DYCONVERT_TARGET {

// Products: `PixelProducts`, or `TileProducts` where Winograd's filtering is faster.
template <typename T, template <typename> class Products>
class BankGradient {
 public:
  explicit BankGradient(const Gradients<T>& to)
      : to_(to),
        shape_(to.shape),
        channel_panels_(divided_up(shape_.group_in(), kTogether * kLanes<T>)),
        width_(rounded_up(divided_up(shape_.group_in(), channel_panels_), kLanes<T>)),
        products_(shape_, width_),
        image_(shape_.groups * channel_panels_ * products_.panel()) {
    const Shape& s = shape_;
    // The bank and its gradient are read once for all images that are laid out together.
    const i64 together = max(kLaidOut, 2 * s.g * to.expert()) / (image_ + products_.grad_elements());
    images_ = divided_up(s.images, divided_up(s.images, max<i64>(1, together)));
    rows_ = min(s.group_out(), s.taps() == 1 ? kPointwiseRows : kRows);
    lanes_ = min(channel_panels_, s.taps() == 1 ? kPointwisePanels : 1) * width_;
    const i64 blocks = s.groups * divided_up(s.group_out(), rows_), chunks = divided_up(s.group_in(), lanes_);
    channel_ranges_ = min(chunks, divided_up(4 * s.threads, blocks));
    image_ranges_ = min(images_, divided_up(4 * s.threads, blocks * channel_ranges_));
  }

  void compute() {
    const Shape& s = shape_;
    static thread_local Buffer<T> partial;
    T* x = scratch<T>().of(images_ * (image_ + products_.grad_elements()));
    T* grads = x + images_ * image_;
    T* banks = to_.grad_bank && image_ranges_ > 1 ? partial.of((image_ranges_ - 1) * s.g * to_.expert()) : nullptr;
    const i64 blocks = divided_up(s.group_out(), rows_), sets = s.groups * blocks;
    const i64 slots = to_.per() == 1 ? sets * channel_ranges_ : channel_ranges_;
    std::vector<T> etas(slots * s.images * s.g * to_.per());
    // Blocks of output channels add to the same factors if they are of one group, or if all groups share factors.
    const i64 factor_slots = s.factor_groups > 1 ? blocks : sets;
    std::vector<T> factors(to_.grad_factors ? factor_slots * to_.all_factors() : 0);
    for (i64 first = 0; first < s.images; first += images_) {
      const i64 count = min(images_, s.images - first);
      const i64 image_ranges = min(image_ranges_, count);  // the last images may have fewer; other partials stay
      lay_out(to_.x + first * s.x_image, count, x);
      products_.lay_out_grad(to_.grad + first * s.out_channels * s.pixels(), count, grads, to_.parallel_for);
      parallel(to_.parallel_for, sets * channel_ranges_ * image_ranges, 1, [&](i64 begin, i64 end) {
        for (; begin < end; begin++) {
          const i64 image_range = begin % image_ranges, channel_range = begin / image_ranges % channel_ranges_;
          const i64 set = begin / image_ranges / channel_ranges_;
          const i64 slot = to_.per() == 1 ? set * channel_ranges_ + channel_range : channel_range;
          const i64 from = count * image_range / image_ranges, images = count * (image_range + 1) / image_ranges - from;
          T* bank = !to_.grad_bank ? nullptr
                    : image_range  ? banks + (image_range - 1) * s.g * to_.expert()
                                   : to_.grad_bank;
          const i64 row = set % blocks * rows_;
          compute_block(x + from * image_, grads + from * products_.grad_elements(), first + from, images,
                        set / blocks, row, min(rows_, s.group_out() - row), channel_range, bank,
                        etas.data() + slot * s.images * s.g * to_.per(),
                        to_.grad_factors ? factors.data() + set % factor_slots * to_.all_factors() : nullptr,
                        first > 0);
        }
      });
    }
    if (banks) sum_partials(to_.parallel_for, banks, image_ranges_ - 1, s.g * to_.expert(), true, to_.grad_bank);
    if (to_.grad_eta)
      sum_partials(to_.parallel_for, etas.data(), slots, s.images * s.g * to_.per(), false, to_.grad_eta);
    if (to_.grad_factors)
      sum_partials(to_.parallel_for, factors.data(), factor_slots, to_.all_factors(), false, to_.grad_factors);
  }

 private:
  // Output channels of a block; 1 x 1 convs, whose rows are short, take more.
  static constexpr i64 kRows = 16, kPointwiseRows = 48;
  // Channel panels at a time for 1 x 1 convs; other convs take one.
  static constexpr i64 kPointwisePanels = 4;
  // Lays the input out as panels of a few channels: [groups, channel_panels, ...].
  void lay_out(const T* x, i64 images, T* to) const {
    const Shape& s = shape_;
    constexpr i64 together = kLanes<T>;
    const i64 blocks = divided_up(s.group_in(), together), all = s.groups * blocks;
    const i64 grain = grain_of(8 * products_.panel() * together / width_);
    parallel(to_.parallel_for, images * all, grain, [&](i64 begin, i64 end) {
      for (; begin < end; begin++) {
        const i64 n = begin / all, group = begin / blocks % s.groups, first = begin % blocks * together;
        const T* from = x + n * s.x_image + (group * s.group_in() + first) * s.x_channel;
        T* panel = to + n * image_ + (group * channel_panels_ + first / width_) * products_.panel();
        products_.lay_out(from, min(together, s.group_in() - first), panel + first % width_);
      }
    });
  }

  // The gradients of `rows` output channels of a group, and a range of its input channels, from some images.
  void compute_block(const T* x, const T* grads, i64 image, i64 images, i64 group, i64 row, i64 rows, i64 channel_range,
                     T* grad_bank, T* grad_eta, T* grad_factors, bool add) {
    const Shape& s = shape_;
    const i64 taps = s.taps(), chunks = divided_up(s.group_in(), lanes_), channel = group * s.group_out() + row;
    static thread_local Buffer<T> products, gradients, copies;
    T* product = products.of(taps * rows_ * lanes_);
    T* kernels = gradients.of(kReduced * rows_ * lanes_ * taps);
    const i64 end = chunks * (channel_range + 1) / channel_ranges_;
    for (i64 chunk = chunks * channel_range / channel_ranges_; chunk < end; chunk++) {
      const i64 c = chunk * lanes_, channels = min(lanes_, s.group_in() - c), length = channels * taps;
      const i64 ld = taps == 1 ? rounded_up(channels, width_) : length;
      const i64 at = channel * s.elements() + c * taps;
      const BankBlock<T> in_bank{to_.bank + at, grad_bank ? grad_bank + at : nullptr, s.elements(), to_.expert()};
      // A block that is read for many images is copied first: in the bank its rows are far apart and map to the same
      // cache sets.
      const bool copied = images > kReduced;
      T* copy = copied ? copies.of(2 * s.g * rows * length) : nullptr;
      const BankBlock<T> in_copy =
          copied ? BankBlock<T>{copy, grad_bank ? copy + s.g * rows * length : nullptr, length, rows * length}
                 : in_bank;
      if (copied) {
        copy_block(in_bank.bank, in_bank, copy, in_copy, rows, length);
        if (grad_bank && add) copy_block(in_bank.grad, in_bank, in_copy.grad, in_copy, rows, length);
      }
      for (i64 n = 0; n < images; n += kReduced) {
        const i64 now = min(kReduced, images - n);
        for (i64 j = 0; j < now; j++) {
          T* kernel = kernels + j * rows * ld;
          T* to = taps == 1 ? kernel : product;
          products_.multiply_image(to_.grad + (image + n + j) * s.out_channels * s.pixels(),
                                   grads + (n + j) * products_.grad_elements(), channel, rows,
                                   x + (n + j) * image_ + (group * channel_panels_ + c / width_) * products_.panel(),
                                   rounded_up(channels, width_), to);
          if (taps > 1)
            for (i64 m = 0; m < rows; m++)
              transpose(product + m * width_, rows * width_, taps, channels, kernel + m * ld, taps);
        }
        reduce(to_, image + n, now, channel, rows, c * taps, length, ld, kernels, in_copy, grad_eta, grad_factors,
               add || n);
      }
      if (copied && grad_bank) copy_block(in_copy.grad, in_copy, in_bank.grad, in_bank, rows, length);
    }
  }

  void copy_block(const T* from, const BankBlock<T>& from_block, T* to, const BankBlock<T>& to_block, i64 rows,
                  i64 length) const {
    for (i64 i = 0; i < shape_.g; i++)
      for (i64 row = 0; row < rows; row++)
        memcpy(to + i * to_block.expert + row * to_block.row, from + i * from_block.expert + row * from_block.row,
               length * sizeof(T));
  }

  const Gradients<T>& to_;
  const Shape& shape_;
  const i64 channel_panels_, width_;  // panels of a group, and channels of a panel
  const Products<T> products_;
  const i64 image_;            // elements of an image of the input, laid out
  i64 images_;                 // images laid out at a time
  i64 rows_, lanes_;           // output channels of a block, and lanes of input channels at a time
  i64 channel_ranges_, image_ranges_;  // threads share the input channels in so many ranges, and the images
};

}  // namespace DYCONVERT_TARGET
