// Matrices turned round, a vector's width at a time.
#pragma once
#include "vector.h"

namespace dyconvert {

// Four elements from a row, and with vectors of eight, four more from another.
inline Vector<float> load_fours(const float* row, const float* other) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  return __builtin_shufflevector(*reinterpret_cast<const Four*>(row), *reinterpret_cast<const Four*>(other), 0, 1, 2, 3,
                                 4, 5, 6, 7);
}
inline Vector<double> load_fours(const double* row, const double*) { return load(row); }

inline void store_fours(float* row, float* other, Vector<float> value) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  *reinterpret_cast<Four*>(row) = __builtin_shufflevector(value, value, 0, 1, 2, 3);
  *reinterpret_cast<Four*>(other) = __builtin_shufflevector(value, value, 4, 5, 6, 7);
}
inline void store_fours(double* row, double*, Vector<double> value) { store(row, value); }

// Squares of 4 x 4 turned round, as many as a vector has fours.
inline void turn(Vector<float> (&rows)[4]) {
  const Vector<float> a = __builtin_shufflevector(rows[0], rows[1], 0, 8, 1, 9, 4, 12, 5, 13);
  const Vector<float> b = __builtin_shufflevector(rows[2], rows[3], 0, 8, 1, 9, 4, 12, 5, 13);
  const Vector<float> c = __builtin_shufflevector(rows[0], rows[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const Vector<float> d = __builtin_shufflevector(rows[2], rows[3], 2, 10, 3, 11, 6, 14, 7, 15);
  rows[0] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
  rows[1] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  rows[2] = __builtin_shufflevector(c, d, 0, 1, 8, 9, 4, 5, 12, 13);
  rows[3] = __builtin_shufflevector(c, d, 2, 3, 10, 11, 6, 7, 14, 15);
}
inline void turn(Vector<double> (&rows)[4]) {
  const Vector<double> a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 2, 6);
  const Vector<double> b = __builtin_shufflevector(rows[2], rows[3], 0, 4, 2, 6);
  const Vector<double> c = __builtin_shufflevector(rows[0], rows[1], 1, 5, 3, 7);
  const Vector<double> d = __builtin_shufflevector(rows[2], rows[3], 1, 5, 3, 7);
  rows[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  rows[1] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  rows[2] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  rows[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// columns[j] = from[i, j] for four columns, and as many rows as a vector has lanes.
template <typename T>
inline void load_columns(const T* from, i64 ld, Vector<T> (&columns)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) columns[i] = load_fours(from + i * ld, from + (i + 4) * ld);
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
