// The register tile: a few output channels of a kernel times a few vectors of pixels.
#pragma once
#include "base/vector.h"

namespace DYCONVERT_TARGET {

// The most vectors of pixels that are taken together.
constexpr int kTogether = 3;

// Rows of a tile of J vectors: M * J sums, J vectors of pixels and one weight are what the registers hold. For a single
// vector, more rows than hide a multiplication's latency gain nothing.
constexpr int tile_rows(int vectors) {
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

// out[m, j] = sum_k a[m * lda + steps[k]] * x[j][offsets[k]], added to what is there if `add`.
template <typename T, int M, int J>
void multiply_tile(const T* __restrict a, i64 lda, const int32_t* __restrict steps, const T* const* x,
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
using MultiplyTile = void (*)(const T*, i64, const int32_t*, const T* const*, const int32_t*, i64, T*, i64, bool);

// Vectors of pixels that are taken together, of `left`: threes fill the registers best, and ones worst.
inline int vectors_together(i64 left) { return left >= 5 || left == 3 ? 3 : left >= 2 ? 2 : 1; }

// Call what multiplies some rows, from one on, for all: in tiles of about one size, as many as the registers have room
// for beside so many vectors.
template <typename F>
inline void each_tile(i64 rows, int vectors, const F& tile) {
  const i64 most = tile_rows(vectors);
  for (i64 left = rows, row = 0; left > 0;) {
    const i64 now = divided_up(left, divided_up(left, most));
    tile(row, now);
    row += now;
    left -= now;
  }
}

// Functions by the number of their rows, from one on: Tile<M>::function.
template <typename Function, template <int> class Tile, int... m>
constexpr std::array<Function, sizeof...(m)> tiles_of(std::integer_sequence<int, m...>) {
  return {Tile<m + 1>::function...};
}
template <typename Function, template <int> class Tile, int vectors>
constexpr auto kTilesOf = tiles_of<Function, Tile>(std::make_integer_sequence<int, tile_rows(vectors)>{});

template <typename T>
struct MultiplyTiles {
  template <int M>
  struct One {
    static constexpr MultiplyTile<T> function = multiply_tile<T, M, 1>;
  };
  template <int M>
  struct Two {
    static constexpr MultiplyTile<T> function = multiply_tile<T, M, 2>;
  };
  template <int M>
  struct Three {
    static constexpr MultiplyTile<T> function = multiply_tile<T, M, 3>;
  };
};

// a[rows, length] times x[length, vectors], as `multiply_tile` says.
template <typename T>
void multiply(const T* a, i64 lda, i64 rows, const int32_t* steps, const T* const* x, int vectors,
              const int32_t* offsets, i64 length, T* out, i64 ldo, bool add) {
  using Tiles = MultiplyTiles<T>;
  static constexpr const MultiplyTile<T>* kTiles[] = {kTilesOf<MultiplyTile<T>, Tiles::template One, 1>.data(),
                                                      kTilesOf<MultiplyTile<T>, Tiles::template Two, 2>.data(),
                                                      kTilesOf<MultiplyTile<T>, Tiles::template Three, 3>.data()};
  each_tile(rows, vectors, [&](i64 row, i64 now) {
    kTiles[vectors - 1][now - 1](a + row * lda, lda, steps, x, offsets, length, out + row * ldo, ldo, add);
  });
}

}  // namespace DYCONVERT_TARGET
