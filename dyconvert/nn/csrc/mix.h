// Mixing: w~ = sum_i eta_i w_i (DyNet, eq. 1), of a part of one image's kernel.
#pragma once
#include "half.h"
#include "problem.h"

namespace dyconvert {

// Vectors that are mixed together, so that an expert's coefficient is read once for all of them.
constexpr int kMixed = 8;

template <typename T, typename B, int J>
inline void mix_vectors(T* a, const B* bank, i64 expert, const T* eta, i64 g) {
  Vector<T> sums[J] = {};
  for (i64 i = 0; i < g; i++) {
    const T own = eta[i];
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) sums[j] += own * load_as<T>(bank + i * expert + j * kLanes<T>);
  }
  for (int j = 0; j < J; j++) store(a + j * kLanes<T>, sums[j]);
}

// a[k] = sum_i eta[i] bank[i * expert + k], for k < length.
template <typename T, typename B>
inline void mix_row(T* a, const B* bank, i64 expert, i64 length, const T* eta, i64 g) {
  i64 k = 0;
  for (; k + kMixed * kLanes<T> <= length; k += kMixed * kLanes<T>) mix_vectors<T, B, kMixed>(a + k, bank + k, expert, eta, g);
  for (; k + kLanes<T> <= length; k += kLanes<T>) mix_vectors<T, B, 1>(a + k, bank + k, expert, eta, g);
  for (; k < length; k++) {
    T sum = 0;
    for (i64 i = 0; i < g; i++) sum += eta[i] * static_cast<T>(value_of(bank[i * expert + k]));
    a[k] = sum;
  }
}

// Elements of a row that the experts have in the innermost cache while it is mixed for one image after the other.
constexpr i64 kMixedLength = 512;

// Elements [k, k + length) of the kernels of `rows` output channels from `channel` on, for `images` images from `image`
// on: a[images, rows, lda].
template <typename T, typename B>
void mix(const Problem<T, B>& problem, i64 image, i64 images, i64 channel, i64 rows, i64 k, i64 length, i64 lda, T* a) {
  const Shape& s = problem.shape;
  const i64 elements = s.elements(), expert = s.out_channels * elements;
  const T* eta = problem.eta + image * s.eta_image + channel * s.eta_channel;
  const B* bank = problem.bank + channel * elements + k;
  static thread_local Buffer<T> coefficients;
  T* own = coefficients.of(images * s.g);
  auto take = [&](i64 row) {
    for (i64 n = 0; n < images; n++)
      for (i64 i = 0; i < s.g; i++) own[n * s.g + i] = eta[n * s.eta_image + i * s.eta_expert + row * s.eta_channel];
  };
  if (!s.eta_channel && length == elements && lda == elements) {  // rows one behind the other, mixed alike
    length *= rows;
    lda *= rows;
    rows = 1;
  }
  for (i64 row = 0; row < rows; row++) {
    if (!row || s.eta_channel) take(row);
    for (i64 at = 0; at < length; at += kMixedLength)
      for (i64 n = 0; n < images; n++)
        mix_row(a + (n * rows + row) * lda + at, bank + row * elements + at, expert, min(kMixedLength, length - at),
                own + n * s.g, s.g);
  }
}

// What is added to one output channel of one image: its mixed bias and its shift.
template <typename T, typename B>
inline T added(const Problem<T, B>& problem, i64 image, i64 channel) {
  const Shape& s = problem.shape;
  T sum = problem.shift ? problem.shift[channel] : 0;
  if (problem.bias) {
    const T* eta = problem.eta + image * s.eta_image + channel * s.eta_channel;
    for (i64 i = 0; i < s.g; i++)
      sum += eta[i * s.eta_expert] * static_cast<T>(value_of(problem.bias[i * s.out_channels + channel]));
  }
  return sum;
}

}  // namespace dyconvert
