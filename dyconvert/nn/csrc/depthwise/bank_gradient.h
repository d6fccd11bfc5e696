// The gradients of the bank and the coefficients of a conv of one input channel per group: for each tap, the sum over a
// plane of the output's gradient times the input that the tap reads.
#pragma once
#include "depthwise/correlate.h"
#include "base/reduce.h"

namespace DYCONVERT_TARGET {

template <typename T>
class DepthwiseBankGradient {
 public:
  explicit DepthwiseBankGradient(const Gradients<T>& to)
      : to_(to),
        shape_(to.shape),
        input_(shape_, to.x, 1, whole_columns(shape_)),
        fields_(fields_of_conv<T>(shape_, input_)) {}

  void compute() {
    const Shape& s = shape_;
    const i64 blocks = divided_up(s.in_channels, kChannels), per = to_.per(), slots = per == 1 ? blocks : 1;
    std::vector<T> etas(slots * s.images * s.g * per);
    // With factors per group, no two blocks add to the same factors, for a group has one input channel.
    const i64 factor_slots = s.factor_groups > 1 ? 1 : blocks;
    std::vector<T> factors(to_.grad_factors ? factor_slots * to_.all_factors() : 0);
    parallel(to_.parallel_for, blocks, 1, [&](i64 begin, i64 end) {
      for (; begin < end; begin++)
        compute_block(begin * kChannels, min(kChannels, s.in_channels - begin * kChannels),
              etas.data() + (per == 1 ? begin : 0) * s.images * s.g * per,
              to_.grad_factors ? factors.data() + begin % factor_slots * to_.all_factors() : nullptr);
    });
    if (to_.grad_eta) sum_partials(to_.parallel_for, etas.data(), slots, s.images * s.g * per, false, to_.grad_eta);
    if (to_.grad_factors)
      sum_partials(to_.parallel_for, factors.data(), factor_slots, to_.all_factors(), false, to_.grad_factors);
  }

 private:
  // Input channels of a block.
  static constexpr i64 kChannels = 8;

  void compute_block(i64 first, i64 channels, T* grad_eta, T* grad_factors) {
    const Shape& s = shape_;
    const i64 group_out = s.group_out(), taps = s.taps(), rows = channels * group_out;
    static thread_local Buffer<T> planes, buffer, kernels;
    T* scratch = planes.of(input_.scratch_elements());
    input_.clear(scratch);
    T* sums = buffer.of(taps * kLanes<T>);
    T* kernel = kernels.of(kReduced * rows * taps);
    const i64 at = first * group_out * taps;
    const BankBlock<T> bank_block{to_.bank + at, to_.grad_bank ? to_.grad_bank + at : nullptr, taps, to_.expert()};
    const T* end = to_.grad + s.images * s.out_channels * s.pixels();
    for (i64 n = 0; n < s.images; n += kReduced) {
      const i64 now = min(kReduced, s.images - n);
      for (i64 j = 0; j < now; j++)
        for (i64 c = 0; c < channels; c++) {
          const T* plane = input_.read(n + j, first + c, 1, scratch);
          for (i64 m = 0; m < group_out; m++) {
            const i64 row = c * group_out + m;
            const T* gradient = to_.grad + ((n + j) * s.out_channels + first * group_out + row) * s.pixels();
            correlate(input_, fields_, plane, gradient, end, taps, sums);
            sum_vectors(sums, taps, kernel + (j * rows + row) * taps);
          }
        }
      reduce(to_, n, now, first * group_out, rows, 0, taps, taps, kernel, bank_block, grad_eta, grad_factors, n > 0);
    }
  }

  const Gradients<T>& to_;
  const Shape& shape_;
  const Input<T> input_;
  const std::vector<Field> fields_;
};

}  // namespace DYCONVERT_TARGET
