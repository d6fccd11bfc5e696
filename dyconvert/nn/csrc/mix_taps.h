// Mixing kernels that are no more than a few taps.
#pragma once
#include "mix.h"

namespace dyconvert {

// The kernels of `rows` output channels from `channel` on, one behind the other, for one image. All there is of a bank
// is a row of taps each.
template <typename T, typename B>
void mix_taps(const Problem<T, B>& problem, i64 image, i64 channel, i64 rows, T* kernels) {
  const Shape& s = problem.shape;
  const i64 taps = s.taps(), expert = s.out_channels * taps;
  if (!s.eta_channel || taps < kLanes<T>) {
    mix(problem, image, 1, channel, rows, 0, taps, taps, kernels);
    return;
  }
  const T* eta = problem.eta + image * s.eta_image + channel * s.eta_channel;
  const B* bank = problem.bank + channel * taps;
  for (i64 row = 0; row < rows; row++, eta += s.eta_channel, bank += taps, kernels += taps)
    for (i64 left = 0; left < taps; left += kLanes<T>) {
      const i64 at = min(left, taps - kLanes<T>);  // the last vector ends with the row
      Vector<T> sum = {};
      for (i64 i = 0; i < s.g; i++) sum += eta[i * s.eta_expert] * load_as<T>(bank + i * expert + at);
      store(kernels + at, sum);
    }
}

}  // namespace dyconvert
