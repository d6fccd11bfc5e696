// The gradients of the bank and the coefficients of a conv of one input channel per group: sums over a plane, of the
// output's gradient times what each tap meets.
#pragma once
#include "planes.h"
#include "reduce.h"

namespace dyconvert {

template <typename T>
class DepthwiseBankGradient {
 public:
  explicit DepthwiseBankGradient(const Gradients<T>& to) : to_(to), shape_(to.shape), planes_(shape_) {
    const Shape& s = shape_;
    length_ = rounded_up((s.out_height - 1) * planes_.pitch() + s.out_width, kLanes<T>);
    for (i64 tap = 0; tap < s.taps(); tap++) offsets_.push_back(planes_.offset_of_tap(tap));
  }

  void run() {
    const Shape& s = shape_;
    const i64 blocks = divided_up(s.in_channels, kChannels), per = to_.per(), slots = per == 1 ? blocks : 1;
    std::vector<T> etas(slots * s.images * s.g * per);
    parallel(to_.parallel_for, blocks, 1, [&](i64 begin, i64 end) {
      for (; begin < end; begin++)
        block(begin * kChannels, min(kChannels, s.in_channels - begin * kChannels),
              etas.data() + (per == 1 ? begin : 0) * s.images * s.g * per);
    });
    if (to_.grad_eta) sum_parts(to_.parallel_for, etas.data(), slots, s.images * s.g * per, false, to_.grad_eta);
  }

 private:
  // Input channels at a time.
  static constexpr i64 kChannels = 8;

  void block(i64 first, i64 channels, T* grad_eta) {
    const Shape& s = shape_;
    const i64 each = s.group_out(), taps = s.taps(), rows = channels * each;
    static thread_local Buffer<T> planes, gradients, kernels;
    T* plane = planes.of(planes_.plane + 2 * kLanes<T>);
    std::fill(plane, plane + planes_.plane + 2 * kLanes<T>, T(0));
    T* grad = gradients.of(length_);
    std::fill(grad, grad + length_, T(0));  // between rows it stays so
    T* kernel = kernels.of(kReduced * rows * taps);
    const i64 at = first * each * taps;
    const BankPart<T> part{to_.bank + at, to_.grad_bank ? to_.grad_bank + at : nullptr, taps, to_.expert()};
    for (i64 n = 0; n < s.images; n += kReduced) {
      const i64 now = min(kReduced, s.images - n);
      for (i64 j = 0; j < now; j++)
        for (i64 c = 0; c < channels; c++) {
          planes_.lay_out(to_.x + (n + j) * s.x_image + (first + c) * s.x_channel, 1, plane);
          for (i64 m = 0; m < each; m++) {
            const i64 row = c * each + m;
            const T* from = to_.grad + ((n + j) * s.out_channels + first * each + row) * s.pixels();
            for (i64 y = 0; y < s.out_height; y++)
              copy(grad + y * planes_.pitch(), from + y * s.out_width, s.out_width);
            T* to = kernel + (j * rows + row) * taps;
            i64 tap = 0;
            for (; tap + 9 <= taps; tap += 9) sum_taps<9>(grad, plane, tap, to);
            for (; tap + 5 <= taps; tap += 5) sum_taps<5>(grad, plane, tap, to);
            for (; tap < taps; tap++) sum_taps<1>(grad, plane, tap, to);
          }
        }
      reduce(to_, n, now, first * each, rows, taps, taps, kernel, part, grad_eta, n > 0);
    }
  }

  // to[tap + t] = sum over the plane of the output's gradient times what the tap meets.
  template <int Taps>
  void sum_taps(const T* grad, const T* plane, i64 tap, T* to) const {
    Vector<T> sums[Taps] = {};
    const T* from[Taps];
    for (int t = 0; t < Taps; t++) from[t] = plane + offsets_[tap + t];
    for (i64 at = 0; at < length_; at += kLanes<T>) {
      const Vector<T> gradient = load(grad + at);
#pragma GCC unroll 9
      for (int t = 0; t < Taps; t++) sums[t] += gradient * load(from[t] + at);
    }
    for (int t = 0; t < Taps; t++) {
      T sum = 0;
      for (i64 lane = 0; lane < kLanes<T>; lane++) sum += sums[t][lane];
      to[tap + t] = sum;
    }
  }

  const Gradients<T>& to_;
  const Shape& shape_;
  const Planes<T> planes_;
  i64 length_;                // of the output's gradient, laid out as the planes are
  std::vector<i64> offsets_;  // of the taps
};

}  // namespace dyconvert
