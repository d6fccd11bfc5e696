// Matrices turned round, a vector's width at a time.
#pragma once
#include "vector.h"

namespace dyconvert {

// The elements of two vectors in turns: the first halves', and the second halves'.
inline Vector<float> zip_low(Vector<float> a, Vector<float> b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline Vector<float> zip_high(Vector<float> a, Vector<float> b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
inline Vector<double> zip_low(Vector<double> a, Vector<double> b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline Vector<double> zip_high(Vector<double> a, Vector<double> b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }

// to[j, i] = from[i, j] for a vector's width of rows and columns. Zipping the rows of one half with those of the other
// as often as they can be halved turns them round.
template <typename T>
inline void transpose_square(const T* from, i64 ldf, T* to, i64 ldt) {
  constexpr i64 n = kLanes<T>;
  Vector<T> rows[n], zipped[n];
  for (i64 i = 0; i < n; i++) rows[i] = load(from + i * ldf);
  for (i64 half = n; half > 1; half /= 2) {
    for (i64 i = 0; i < n / 2; i++) {
      zipped[2 * i] = zip_low(rows[i], rows[i + n / 2]);
      zipped[2 * i + 1] = zip_high(rows[i], rows[i + n / 2]);
    }
    for (i64 i = 0; i < n; i++) rows[i] = zipped[i];
  }
  for (i64 i = 0; i < n; i++) store(to + i * ldt, rows[i]);
}

// to[j, i] = from[i, j], for i < rows and j < columns.
template <typename T>
void transpose(const T* from, i64 ldf, i64 rows, i64 columns, T* to, i64 ldt) {
  constexpr i64 n = kLanes<T>;
  for (i64 i = 0; i < rows; i += n)
    for (i64 j = 0; j < columns; j += n) {
      if (i + n <= rows && j + n <= columns)
        transpose_square(from + i * ldf + j, ldf, to + j * ldt + i, ldt);
      else
        for (i64 r = i; r < min(i + n, rows); r++)
          for (i64 c = j; c < min(j + n, columns); c++) to[c * ldt + r] = from[r * ldf + c];
    }
}

}  // namespace dyconvert
