// A kernel times the elements that one pixel reads. Where one pixel is left after all whole vectors, it would use a
// vector for a single lane; so lanes are elements of the kernel's rows instead.
#pragma once
#include "base/vector.h"

namespace DYCONVERT_TARGET {

// sums[m] += sum_k a[m * lda + k] * column[k]. sums[m] is a vector, whose lanes sum over different k.
template <typename T, int M>
inline void add_column_rows(const T* __restrict a, i64 lda, const T* __restrict column, i64 length,
                            T* __restrict sums) {
  constexpr i64 lanes = kLanes<T>;
  Vector<T> even[M], odd[M] = {};
  for (int m = 0; m < M; m++) even[m] = load(sums + m * lanes);
  i64 k = 0;
  for (; k + 2 * lanes <= length; k += 2 * lanes) {
    const Vector<T> first = load(column + k), second = load(column + k + lanes);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      even[m] += load(a + m * lda + k) * first;
      odd[m] += load(a + m * lda + k + lanes) * second;
    }
  }
  for (int m = 0; m < M; m++) store(sums + m * lanes, even[m] + odd[m]);
  for (; k < length; k++)
    for (int m = 0; m < M; m++) sums[m * lanes] += a[m * lda + k] * column[k];
}

template <typename T>
inline void add_column(const T* a, i64 lda, i64 rows, const T* column, i64 length, T* sums) {
  i64 m = 0;
  for (; m + 4 <= rows; m += 4) add_column_rows<T, 4>(a + m * lda, lda, column, length, sums + m * kLanes<T>);
  for (; m < rows; m++) add_column_rows<T, 1>(a + m * lda, lda, column, length, sums + m * kLanes<T>);
}

template <typename T>
inline T sum_of_lanes(const T* sums) {
  T sum = 0;
  for (i64 i = 0; i < kLanes<T>; i++) sum += sums[i];
  return sum;
}

}  // namespace DYCONVERT_TARGET
