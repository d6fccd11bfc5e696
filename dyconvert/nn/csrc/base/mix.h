// Mixing: w~ = sum_i eta_i w_i (DyNet, eq. 1), of a part of one image's kernel, times its factors (ODConv, eq. 3).
#pragma once
#include "base/half.h"
#include "base/problem.h"

namespace DYCONVERT_TARGET {

// Images that are mixed for together, so that the bank is read once for them, and vectors of sums in registers.
constexpr int kMixedImages = 4, kMixed = 8;

// What is mixed of a row of the bank.
template <typename T, typename B>
struct MixedRow {
  const B* bank;
  i64 expert;   // elements from expert to expert
  i64 length;
  const T* eta;  // [images, g]
  i64 g;
  const T* mean;   // of a compressed bank, or null
  const T* shares;  // [images]: how much of the mean is in the mixture
  T* a;
  i64 image;  // elements from image to image
  const T* factors;  // or null
  i64 factors_image;
};

template <typename T, typename B, int N, int J>
inline void mix_vectors(const MixedRow<T, B>& row, i64 k) {
  Vector<T> sums[N][J];
  for (int j = 0; j < J; j++) {
    const Vector<T> mean = row.mean ? load(row.mean + k + j * kLanes<T>) : Vector<T>{};
    for (int n = 0; n < N; n++) sums[n][j] = row.mean ? row.shares[n] * mean : mean;
  }
  const B* bank = row.bank + k;
  for (i64 i = 0; i < row.g; i++, bank += row.expert) {
    Vector<T> vectors[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) vectors[j] = load_as<T>(bank + j * kLanes<T>);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const T own = row.eta[n * row.g + i];
#pragma GCC unroll 8
      for (int j = 0; j < J; j++) sums[n][j] += own * vectors[j];
    }
  }
  if (row.factors)
    for (int n = 0; n < N; n++) {
      const T* factors = row.factors + n * row.factors_image + k;
      for (int j = 0; j < J; j++) sums[n][j] = sums[n][j] * load(factors + j * kLanes<T>);
    }
  for (int n = 0; n < N; n++)
    for (int j = 0; j < J; j++) store(row.a + n * row.image + k + j * kLanes<T>, sums[n][j]);
}

// Of the elements from k on, as many as there are whole vectors. Returns where that ends.
template <typename T, typename B, int N, int J>
inline i64 mix_all_vectors(const MixedRow<T, B>& row, i64 k) {
  for (; k + J * kLanes<T> <= row.length; k += J * kLanes<T>) mix_vectors<T, B, N, J>(row, k);
  if constexpr (J > 1) k = mix_all_vectors<T, B, N, J / 2>(row, k);
  return k;
}

// a[n, k] = sum_i eta[n, i] bank[i * expert + k], for N images and k < length.
template <typename T, typename B, int N>
inline void mix_row(const MixedRow<T, B>& row) {
  for (i64 k = mix_all_vectors<T, B, N, kMixed / N>(row, 0); k < row.length; k++)
    for (int n = 0; n < N; n++) {
      T sum = row.mean ? row.shares[n] * row.mean[k] : T(0);
      for (i64 i = 0; i < row.g; i++)
        sum += row.eta[n * row.g + i] * static_cast<T>(value_of(row.bank[i * row.expert + k]));
      row.a[n * row.image + k] = row.factors ? sum * row.factors[n * row.factors_image + k] : sum;
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
  T* own = coefficients.of(images * (s.g + 1));
  T* shares = own + images * s.g;
  auto take = [&](i64 row) {
    for (i64 n = 0; n < images; n++) {
      shares[n] = 0;
      for (i64 i = 0; i < s.g; i++) {
        const T given = eta[n * s.eta_image + i * s.eta_expert + row * s.eta_channel];
        shares[n] += given;
        own[n * s.g + i] = problem.scale ? given * problem.scale[i * s.out_channels + channel + row] : given;
      }
    }
  };
  const i64 factors_image = s.factor_groups * elements;
  const bool alike = !s.eta_channel && !problem.scale && !problem.factors;  // all rows
  if (alike && length == elements && lda == elements) {  // rows one behind the other, mixed alike
    length *= rows;
    lda *= rows;
    rows = 1;
  }
  for (i64 row = 0; row < rows; row++) {
    if (!row || s.eta_channel || problem.scale) take(row);
    const T* factors = problem.factors_of(image, channel + row);
    for (i64 at = 0; at < length; at += kMixedLength)
      for (i64 n = 0; n < images;) {
        const MixedRow<T, B> part{bank + row * elements + at, expert, min(kMixedLength, length - at),
                                  own + n * s.g, s.g,
                                  problem.mean ? problem.mean + (channel + row) * elements + k + at : nullptr,
                                  shares + n, a + (n * rows + row) * lda + at, rows * lda,
                                  factors ? factors + n * factors_image + k + at : nullptr, factors_image};
        const i64 left = images - n;
        if (left >= kMixedImages)
          mix_row<T, B, kMixedImages>(part), n += kMixedImages;
        else if (left >= 2)
          mix_row<T, B, 2>(part), n += 2;
        else
          mix_row<T, B, 1>(part), n++;
      }
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
      sum += eta[i * s.eta_expert] * problem.bias[i * s.out_channels + channel];
  }
  return sum;
}

}  // namespace DYCONVERT_TARGET
