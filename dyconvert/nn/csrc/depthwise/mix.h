// Mixes kernels of a few taps, with coefficients per output channel.
#pragma once
#include "base/mix.h"

namespace DYCONVERT_TARGET {

// Mixes J vectors of the taps of `rows` output channels, from tap `first` on. The last vector ends with the last tap.
// factors: shared by all these channels, or null.
template <typename T, typename B, int J>
void mix_vectors_of_taps(const Shape& s, i64 rows, i64 first, const T* eta, const B* bank, const T* factors,
                         T* kernels) {
  const i64 taps = s.taps(), expert = s.out_channels * taps, apart = s.eta_expert, g = s.g;
  const i64 last = min(first + (J - 1) * kLanes<T>, taps - kLanes<T>);
  for (i64 row = 0; row < rows; row++, eta += s.eta_channel, bank += taps, kernels += taps) {
    Vector<T> sums[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) sums[j] = Vector<T>{};
    for (i64 i = 0; i < g; i++) {
      const T coefficient = eta[i * apart];
#pragma GCC unroll 4
      for (int j = 0; j < J; j++)
        sums[j] += coefficient * load_as<T>(bank + i * expert + (j < J - 1 ? first + j * kLanes<T> : last));
    }
    if (factors)
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) sums[j] = sums[j] * load(factors + (j < J - 1 ? first + j * kLanes<T> : last));
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) store(kernels + (j < J - 1 ? first + j * kLanes<T> : last), sums[j]);
  }
}

// Mixes the kernels of `rows` output channels from `channel` on, for one image; they lie one behind the other.
template <typename T, typename B>
void mix_taps(const Problem<T, B>& problem, i64 image, i64 channel, i64 rows, T* kernels) {
  const Shape& s = problem.shape;
  const i64 taps = s.taps();
  if (!s.eta_channel || taps < kLanes<T> || problem.mean) {
    mix(problem, image, 1, channel, rows, 0, taps, taps, kernels);
    return;
  }
  static constexpr decltype(&mix_vectors_of_taps<T, B, 1>) kMixVectors[] = {
      mix_vectors_of_taps<T, B, 1>, mix_vectors_of_taps<T, B, 2>, mix_vectors_of_taps<T, B, 3>,
      mix_vectors_of_taps<T, B, 4>};
  const T* eta = problem.eta + image * s.eta_image + channel * s.eta_channel;
  const B* bank = problem.bank + channel * taps;
  for (i64 first = 0; first < taps; first += 4 * kLanes<T>) {
    const i64 vectors = min<i64>(4, divided_up(taps - first, kLanes<T>));
    kMixVectors[vectors - 1](s, rows, first, eta, bank, s.factor_groups == 1 ? problem.factors_of(image, channel) : nullptr,
                             kernels);
  }
  if (s.factor_groups <= 1) return;
  for (i64 row = 0; row < rows; row++) {
    const T* factors = problem.factors_of(image, channel + row);
    for (i64 tap = 0; tap < taps; tap++) kernels[row * taps + tap] *= factors[tap];
  }
}

}  // namespace DYCONVERT_TARGET
