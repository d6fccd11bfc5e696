// Matrices turned round, a vector's width at a time.
#pragma once
#ifdef __AVX__
#include <immintrin.h>
#endif

#include "vector.h"

namespace dyconvert {

// Four elements from a row, and with vectors of eight, four more from another.
inline Vector<float> load_fours(const float* row, const float* other) {
#ifdef __AVX__
  return (Vector<float>)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)), _mm_loadu_ps(other), 1);
#else
  Vector<float> value;
  memcpy(&value, row, 16);
  memcpy(reinterpret_cast<char*>(&value) + 16, other, 16);
  return value;
#endif
}
inline Vector<double> load_fours(const double* row, const double*) { return load(row); }

inline void store_fours(float* row, float* other, Vector<float> value) {
#ifdef __AVX__
  _mm_storeu_ps(row, _mm256_castps256_ps128((__m256)value));
  _mm_storeu_ps(other, _mm256_extractf128_ps((__m256)value, 1));
#else
  memcpy(row, &value, 16);
  memcpy(other, reinterpret_cast<const char*>(&value) + 16, 16);
#endif
}
inline void store_fours(double* row, double*, Vector<double> value) { store(row, value); }

// Squares of 4 x 4 turned round, as many as a vector has fours.
inline void turn(Vector<float> (&rows)[4]) {
  const Vector<float> a = shuffle<0, 8, 1, 9, 4, 12, 5, 13>(rows[0], rows[1]);
  const Vector<float> b = shuffle<0, 8, 1, 9, 4, 12, 5, 13>(rows[2], rows[3]);
  const Vector<float> c = shuffle<2, 10, 3, 11, 6, 14, 7, 15>(rows[0], rows[1]);
  const Vector<float> d = shuffle<2, 10, 3, 11, 6, 14, 7, 15>(rows[2], rows[3]);
  rows[0] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(a, b);
  rows[1] = shuffle<2, 3, 10, 11, 6, 7, 14, 15>(a, b);
  rows[2] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(c, d);
  rows[3] = shuffle<2, 3, 10, 11, 6, 7, 14, 15>(c, d);
}
inline void turn(Vector<double> (&rows)[4]) {
  const Vector<double> a = shuffle<0, 4, 2, 6>(rows[0], rows[1]);
  const Vector<double> b = shuffle<0, 4, 2, 6>(rows[2], rows[3]);
  const Vector<double> c = shuffle<1, 5, 3, 7>(rows[0], rows[1]);
  const Vector<double> d = shuffle<1, 5, 3, 7>(rows[2], rows[3]);
  rows[0] = shuffle<0, 1, 4, 5>(a, b);
  rows[1] = shuffle<0, 1, 4, 5>(c, d);
  rows[2] = shuffle<2, 3, 6, 7>(a, b);
  rows[3] = shuffle<2, 3, 6, 7>(c, d);
}

// columns[j] = from[i, j] for four columns, and as many rows as a vector has lanes.
template <typename T>
inline void load_columns(const T* from, i64 ld, Vector<T> (&columns)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) columns[i] = load_fours(from + i * ld, from + (i + 4) * ld);
  turn(columns);
}

// The same of rows that lie anywhere: what is `offset` from where each of them starts.
template <typename T>
inline void load_columns(const T* const (&rows)[kLanes<T>], i64 offset, Vector<T> (&columns)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) columns[i] = load_fours(rows[i] + offset, rows[(i + 4) % kLanes<T>] + offset);
  turn(columns);
}

// to[j, i] = from[i, j] for a vector's width of rows and columns.
template <typename T>
inline void transpose_square(const T* from, i64 ldf, T* to, i64 ldt) {
  for (i64 first = 0; first < kLanes<T>; first += 4) {
    Vector<T> columns[4];
    load_columns(from + first, ldf, columns);
    for (i64 j = 0; j < 4; j++) store(to + (first + j) * ldt, columns[j]);
  }
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
