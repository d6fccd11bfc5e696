// Mixing some elements of an image's kernel: w~ = sum_i eta_i w_i (DyNet, eq. 1), times its factors (ODConv, eq. 3).
#pragma once
#include "base/half.h"
#include "base/problem.h"

namespace DYCONVERT_TARGET {

// Kernels are mixed for this many images at once, so that the bank is read once for them; and so many vectors of sums
// are in registers.
constexpr int kMixedImages = 4, kMixedVectors = 8;

// Some elements of one output channel, to be mixed for a few images.
template <typename T, typename B>
struct MixedRow {
  const B* bank;
  i64 expert;   // elements from expert to expert
  i64 length;
  const T* eta;  // [images, g]
  i64 g;
  const T* mean;   // of a compressed bank, or null
  const T* shares;  // [images]: what the mean is multiplied by, the sum of the coefficients
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
      const T coefficient = row.eta[n * row.g + i];
#pragma GCC unroll 8
      for (int j = 0; j < J; j++) sums[n][j] += coefficient * vectors[j];
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

// Mixes whole vectors from element k on. Returns the first element that is left.
template <typename T, typename B, int N, int J>
inline i64 mix_all_vectors(const MixedRow<T, B>& row, i64 k) {
  for (; k + J * kLanes<T> <= row.length; k += J * kLanes<T>) mix_vectors<T, B, N, J>(row, k);
  if constexpr (J > 1) k = mix_all_vectors<T, B, N, J / 2>(row, k);
  return k;
}

// a[n, k] = sum_i eta[n, i] bank[i * expert + k], for N images and k < length.
template <typename T, typename B, int N>
inline void mix_row(const MixedRow<T, B>& row) {
  for (i64 k = mix_all_vectors<T, B, N, kMixedVectors / N>(row, 0); k < row.length; k++)
    for (int n = 0; n < N; n++) {
      T sum = row.mean ? row.shares[n] * row.mean[k] : T(0);
      for (i64 i = 0; i < row.g; i++)
        sum += row.eta[n * row.g + i] * static_cast<T>(value_of(row.bank[i * row.expert + k]));
      row.a[n * row.image + k] = row.factors ? sum * row.factors[n * row.factors_image + k] : sum;
    }
}

// Elements of a row at a time: all experts' fit into the innermost cache while they are mixed for one image after
// the other.
constexpr i64 kMixedLength = 512;

// Elements [k, k + length) of the kernels of `rows` output channels from `channel` on, for `images` images from `image`
// on: a[images, rows, lda].
template <typename T, typename B>
void mix(const Problem<T, B>& problem, i64 image, i64 images, i64 channel, i64 rows, i64 k, i64 length, i64 lda, T* a) {
  const Shape& s = problem.shape;
  const i64 elements = s.elements(), expert = s.out_channels * elements;
  const T* eta = problem.eta + image * s.eta_image + channel * s.eta_channel;
  const B* bank = problem.bank + channel * elements + k;
  static thread_local Buffer<T> buffer;
  T* coefficients = buffer.of(images * (s.g + 1));
  T* shares = coefficients + images * s.g;
  auto read_coefficients = [&](i64 row) {
    for (i64 n = 0; n < images; n++) {
      shares[n] = 0;
      for (i64 i = 0; i < s.g; i++) {
        const T coefficient = eta[n * s.eta_image + i * s.eta_expert + row * s.eta_channel];
        shares[n] += coefficient;
        coefficients[n * s.g + i] =
            problem.scale ? coefficient * problem.scale[i * s.out_channels + channel + row] : coefficient;
      }
    }
  };
  const i64 factors_image = s.factor_groups * elements;
  const bool alike = !s.eta_channel && !problem.scale && !problem.factors;  // rows have the same coefficients
  if (alike && length == elements && lda == elements) {  // rows one behind the other, mixed alike
    length *= rows;
    lda *= rows;
    rows = 1;
  }
  for (i64 row = 0; row < rows; row++) {
    if (!row || s.eta_channel || problem.scale) read_coefficients(row);
    const T* factors = problem.factors_of(image, channel + row);
    for (i64 at = 0; at < length; at += kMixedLength)
      for (i64 n = 0; n < images;) {
        const MixedRow<T, B> mixed_row{bank + row * elements + at, expert, min(kMixedLength, length - at),
                                       coefficients + n * s.g, s.g,
                                       problem.mean ? problem.mean + (channel + row) * elements + k + at : nullptr,
                                       shares + n, a + (n * rows + row) * lda + at, rows * lda,
                                       factors ? factors + n * factors_image + k + at : nullptr, factors_image};
        const i64 left = images - n;
        if (left >= kMixedImages)
          mix_row<T, B, kMixedImages>(mixed_row), n += kMixedImages;
        else if (left >= 2)
          mix_row<T, B, 2>(mixed_row), n += 2;
        else
          mix_row<T, B, 1>(mixed_row), n++;
      }
  }
}

// The bias of one output channel of one image: the experts' biases, mixed, plus the shift.
template <typename T, typename B>
inline T mixed_bias(const Problem<T, B>& problem, i64 image, i64 channel) {
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
