// The microtile: a few output channels of a kernel times a few vectors of pixels, with all sums in registers.
#pragma once
#include "base/vector.h"

namespace DYCONVERT_TARGET {

// The most vectors of pixels of a microtile.
constexpr int kTogether = 3;

// Rows M of a microtile of J vectors: the registers hold M * J sums, J vectors of pixels and one weight. With a single
// vector, half as many rows as registers already hide a multiplication's latency.
constexpr int microtile_rows(int vectors) {
  const int registers = DYCONVERT_REGISTERS, per_vector = kHalves ? 2 : 1;
  return std::clamp((registers - 1) / (vectors * per_vector) - 1, 1, vectors == 1 ? registers / 2 : registers);
}

// sums[m][j] += sum_k a[m * lda + steps[k]] * x(k, j), for M rows and J vectors.
template <typename T, int M, int J, typename X>
inline __attribute__((always_inline)) void add_products(Vector<T> (&sums)[M][J], const T* __restrict a, i64 lda,
                                                        const int32_t* __restrict steps, i64 length, const X& x) {
  for (i64 k = 0; k < length; k++) {
    const i64 step = steps[k];
    Vector<T> pixels[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) pixels[j] = x(k, j);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const T weight = a[m * lda + step];
#pragma GCC unroll 8
      for (int j = 0; j < J; j++) sums[m][j] += weight * pixels[j];
    }
  }
}

// out[m, j] = sum_k a[m * lda + steps[k]] * x[j][offsets[k]]; with `add`, it is added to out.
template <typename T, int M, int J>
void multiply_microtile(const T* __restrict a, i64 lda, const int32_t* __restrict steps, const T* const* x,
                        const int32_t* __restrict offsets, i64 length, T* __restrict out, i64 ldo, bool add) {
  Vector<T> sums[M][J];
  const T* from[J];
  for (int j = 0; j < J; j++) from[j] = x[j];
  for (int m = 0; m < M; m++)
    for (int j = 0; j < J; j++) sums[m][j] = add ? load(out + m * ldo + j * kLanes<T>) : Vector<T>{};
  add_products<T, M, J>(sums, a, lda, steps, length, [&](i64 k, int j) { return load(from[j] + offsets[k]); });
  for (int m = 0; m < M; m++)
    for (int j = 0; j < J; j++) store(out + m * ldo + j * kLanes<T>, sums[m][j]);
}

template <typename T>
using MultiplyMicrotile = void (*)(const T*, i64, const int32_t*, const T* const*, const int32_t*, i64, T*, i64, bool);

// Vectors of the next microtile if `left` vectors are left: three fill the registers best, and one worst.
inline int vectors_together(i64 left) { return left >= 5 || left == 3 ? 3 : left >= 2 ? 2 : 1; }

// Splits `rows` into microtiles of about one size, of no more rows than the registers have room for beside `vectors`
// vectors. Calls multiply_rows(first row, count) for each.
template <typename F>
inline void for_each_microtile(i64 rows, int vectors, const F& multiply_rows) {
  const i64 most = microtile_rows(vectors);
  for (i64 left = rows, row = 0; left > 0;) {
    const i64 now = divided_up(left, divided_up(left, most));
    multiply_rows(row, now);
    row += now;
    left -= now;
  }
}

// Microtile<M>::function for M = 1, 2 ... rows.
template <typename Function, template <int> class Microtile, int... m>
constexpr std::array<Function, sizeof...(m)> microtiles_of(std::integer_sequence<int, m...>) {
  return {Microtile<m + 1>::function...};
}
template <typename Function, template <int> class Microtile, int vectors>
constexpr auto kMicrotilesOf =
    microtiles_of<Function, Microtile>(std::make_integer_sequence<int, microtile_rows(vectors)>{});

template <typename T>
struct MultiplyMicrotiles {
  template <int M>
  struct One {
    static constexpr MultiplyMicrotile<T> function = multiply_microtile<T, M, 1>;
  };
  template <int M>
  struct Two {
    static constexpr MultiplyMicrotile<T> function = multiply_microtile<T, M, 2>;
  };
  template <int M>
  struct Three {
    static constexpr MultiplyMicrotile<T> function = multiply_microtile<T, M, 3>;
  };
};

// a[rows, length] times x[length, vectors], as `multiply_tile` says.
template <typename T>
void multiply(const T* a, i64 lda, i64 rows, const int32_t* steps, const T* const* x, int vectors,
              const int32_t* offsets, i64 length, T* out, i64 ldo, bool add) {
  using Of = MultiplyMicrotiles<T>;
  using Function = MultiplyMicrotile<T>;
  static constexpr const Function* kMicrotiles[] = {kMicrotilesOf<Function, Of::template One, 1>.data(),
                                                    kMicrotilesOf<Function, Of::template Two, 2>.data(),
                                                    kMicrotilesOf<Function, Of::template Three, 3>.data()};
  for_each_microtile(rows, vectors, [&](i64 row, i64 now) {
    kMicrotiles[vectors - 1][now - 1](a + row * lda, lda, steps, x, offsets, length, out + row * ldo, ldo, add);
  });
}

}  // namespace DYCONVERT_TARGET
