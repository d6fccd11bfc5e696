// A kernel times a panel: what a few vectors of pixels meet of each element of the input, one behind the other.
#pragma once
#include "base/multiply.h"

namespace DYCONVERT_TARGET {

// Where the results of a panel are.
template <typename T>
struct Results {
  T* at;
  i64 ld;         // from row to row
  i64 back;       // by how much the last vector reaches back into the one before it
  const T* bias;  // of each row, or null: to be added to what is there
};

// results[m, j] = bias[m] + sum_k a[m * lda + steps[k]] * panel[k, j].
template <typename T, int M, int J>
void multiply_panel_tile(const T* __restrict a, i64 lda, const int32_t* __restrict steps, const T* __restrict panel,
                         i64 length, const Results<T>& to, i64 row) {
  Vector<T> sums[M][J];
  const i64 ld = to.ld, back = to.back;
  T* __restrict out = to.at + row * ld;
  const auto at = [&](int m, int j) { return out + m * ld + j * kLanes<T> - (j == J - 1 ? back : 0); };
  for (int m = 0; m < M; m++)
    for (int j = 0; j < J; j++) sums[m][j] = to.bias ? Vector<T>{} + to.bias[row + m] : load(at(m, j));
  add_products<T, M, J>(sums, a, lda, steps, length,
                        [&](i64 k, int j) { return load(panel + (k * J + j) * kLanes<T>); });
  for (int m = 0; m < M; m++)
    for (int j = 0; j < J; j++) store(at(m, j), sums[m][j]);
}

template <typename T>
using PanelTile = void (*)(const T*, i64, const int32_t*, const T*, i64, const Results<T>&, i64);

template <typename T>
struct PanelTiles {
  template <int M>
  struct One {
    static constexpr PanelTile<T> function = multiply_panel_tile<T, M, 1>;
  };
  template <int M>
  struct Two {
    static constexpr PanelTile<T> function = multiply_panel_tile<T, M, 2>;
  };
  template <int M>
  struct Three {
    static constexpr PanelTile<T> function = multiply_panel_tile<T, M, 3>;
  };
};

// a[rows, length] times panel[length, vectors]. after: called with the rows that a tile has done, from one on.
template <typename T, typename F>
void multiply_panel(const T* a, i64 lda, i64 rows, const int32_t* steps, const T* panel, int vectors, i64 length,
                    const Results<T>& to, const F& after) {
  using Tiles = PanelTiles<T>;
  static constexpr const PanelTile<T>* kTiles[] = {kTilesOf<PanelTile<T>, Tiles::template One, 1>.data(),
                                                   kTilesOf<PanelTile<T>, Tiles::template Two, 2>.data(),
                                                   kTilesOf<PanelTile<T>, Tiles::template Three, 3>.data()};
  each_tile(rows, vectors, [&](i64 row, i64 now) {
    kTiles[vectors - 1][now - 1](a + row * lda, lda, steps, panel, length, to, row);
    after(row, now);
  });
}

}  // namespace DYCONVERT_TARGET
