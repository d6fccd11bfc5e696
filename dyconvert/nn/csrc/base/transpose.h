// Transposes matrices, a vector's width at a time.
#pragma once
#include "base/vector.h"

namespace DYCONVERT_TARGET {

// A four: four neighbouring lanes. The number of them in a vector.
template <typename T>
constexpr i64 kFours = kLanes<T> / 4;

// For each four of a and the four of b at the same place, the elements p, q, r, s: 0 to 3 are a's, 4 to 7 b's.
template <int p, int q, int r, int s, typename V, size_t... i>
inline V fours_of_register(V a, V b, std::index_sequence<i...>) {
  constexpr int n = sizeof...(i), numbers[] = {p, q, r, s};
  return shuffle<(int(i) / 4 * 4 + numbers[i % 4] % 4 + (numbers[i % 4] < 4 ? 0 : n))...>(a, b);
}
template <int p, int q, int r, int s, typename V>
inline V fours(V a, V b) {
  return fours_of_register<p, q, r, s>(a, b, kNumbers<V>);
}
template <int p, int q, int r, int s, typename V>
inline Halves<V> fours(Halves<V> a, Halves<V> b) {
  if constexpr (Halves<V>::half >= 4) {
    return {fours<p, q, r, s>(a.low, b.low), fours<p, q, r, s>(a.high, b.high)};
  } else {  // a four is both halves
    const Element<V> all[] = {a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]};
    return {V{all[p], all[q]}, V{all[r], all[s]}};
  }
}

// at(f): the address of four f.
template <typename T, typename At>
inline __attribute__((always_inline)) Vector<T> load_fours(const At& at) {
  if constexpr (kFours<T> == 1) {
    return load(at(0));
  } else if constexpr (kHalves && kFours<T> == 2) {
    return {load_register<T, 4>(at(0)), load_register<T, 4>(at(1))};
  } else {
#if defined(DYCONVERT_AVX512)
    if constexpr (sizeof(T) == 8)
      return (Vector<T>)_mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd(at(0))), _mm256_loadu_pd(at(1)), 1);
    else
      return (Vector<T>)_mm512_insertf32x8(
          _mm512_castps256_ps512(
              _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at(0))), _mm_loadu_ps(at(1)), 1)),
          _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at(2))), _mm_loadu_ps(at(3)), 1), 1);
#elif defined(__AVX__) || defined(DYCONVERT_F16C)
    const auto pair = [&](int f) {
      return (Register<T, 8>)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at(f))), _mm_loadu_ps(at(f + 1)), 1);
    };
    if constexpr (kHalves)
      return {pair(0), pair(2)};
    else
      return pair(0);
#else
    alignas(64) T elements[kLanes<T>];
    for (i64 f = 0; f < kFours<T>; f++) memcpy(elements + 4 * f, at(f), 4 * sizeof(T));
    return load(elements);
#endif
  }
}

template <typename T, typename At>
inline __attribute__((always_inline)) void store_fours(const At& at, Vector<T> value) {
  if constexpr (kFours<T> == 1) {
    store(at(0), value);
  } else if constexpr (kHalves && kFours<T> == 2) {
    store_register<T, 4>(at(0), value.low);
    store_register<T, 4>(at(1), value.high);
  } else {
#if defined(DYCONVERT_AVX512)
    if constexpr (sizeof(T) == 8) {
      _mm256_storeu_pd(at(0), _mm512_castpd512_pd256((__m512d)value));
      _mm256_storeu_pd(at(1), _mm512_extractf64x4_pd((__m512d)value, 1));
    } else {
      _mm_storeu_ps(at(0), _mm512_castps512_ps128((__m512)value));
      _mm_storeu_ps(at(1), _mm512_extractf32x4_ps((__m512)value, 1));
      _mm_storeu_ps(at(2), _mm512_extractf32x4_ps((__m512)value, 2));
      _mm_storeu_ps(at(3), _mm512_extractf32x4_ps((__m512)value, 3));
    }
#elif defined(__AVX__) || defined(DYCONVERT_F16C)
    const auto pair = [&](int f, Register<T, 8> two) {
      _mm_storeu_ps(at(f), _mm256_castps256_ps128((__m256)two));
      _mm_storeu_ps(at(f + 1), _mm256_extractf128_ps((__m256)two, 1));
    };
    if constexpr (kHalves) {
      pair(0, value.low);
      pair(2, value.high);
    } else {
      pair(0, value);
    }
#else
    alignas(64) T elements[kLanes<T>];
    store(elements, value);
    for (i64 f = 0; f < kFours<T>; f++) memcpy(at(f), elements + 4 * f, 4 * sizeof(T));
#endif
  }
}

// Transposes squares of 4 x 4, as many as a vector has fours.
template <typename V>
inline __attribute__((always_inline)) void turn(V (&rows)[4]) {
  if constexpr (sizeof(Element<V>) == 4) {
    const V a = fours<0, 4, 1, 5>(rows[0], rows[1]), b = fours<0, 4, 1, 5>(rows[2], rows[3]);
    const V c = fours<2, 6, 3, 7>(rows[0], rows[1]), d = fours<2, 6, 3, 7>(rows[2], rows[3]);
    rows[0] = fours<0, 1, 4, 5>(a, b);
    rows[1] = fours<2, 3, 6, 7>(a, b);
    rows[2] = fours<0, 1, 4, 5>(c, d);
    rows[3] = fours<2, 3, 6, 7>(c, d);
  } else {
    const V a = fours<0, 4, 2, 6>(rows[0], rows[1]), b = fours<0, 4, 2, 6>(rows[2], rows[3]);
    const V c = fours<1, 5, 3, 7>(rows[0], rows[1]), d = fours<1, 5, 3, 7>(rows[2], rows[3]);
    rows[0] = fours<0, 1, 4, 5>(a, b);
    rows[1] = fours<0, 1, 4, 5>(c, d);
    rows[2] = fours<2, 3, 6, 7>(a, b);
    rows[3] = fours<2, 3, 6, 7>(c, d);
  }
}

// columns[j] = from[i, j] for four columns, and as many rows as a vector has lanes.
template <typename T>
inline void load_columns(const T* from, i64 ld, Vector<T> (&columns)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) columns[i] = load_fours<T>([&](i64 f) { return from + (i + 4 * f) * ld; });
  turn(columns);
}

// The same for rows that lie anywhere: the columns from `offset` on of each of them.
template <typename T>
inline void load_columns(const T* const (&rows)[kLanes<T>], i64 offset, Vector<T> (&columns)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) columns[i] = load_fours<T>([&](i64 f) { return rows[i + 4 * f] + offset; });
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

}  // namespace DYCONVERT_TARGET
