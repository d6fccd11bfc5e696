// A kernel times a panel, whose vectors are read one behind the other.
#pragma once
#include "base/multiply.h"

namespace DYCONVERT_TARGET {

// Where the results of a panel are written.
template <typename T>
struct Results {
  T* at;
  i64 ld;         // from row to row
  i64 back;       // by how much the last vector reaches back into the one before it
  const T* bias;  // of each row; null: the sums are added to the results that are there
};

// results[m, j] = bias[m] + sum_k a[m * lda + steps[k]] * panel[k, j].
template <typename T, int M, int J>
void multiply_panel_microtile(const T* __restrict a, i64 lda, const int32_t* __restrict steps,
                              const T* __restrict panel, i64 length, const Results<T>& to, i64 row) {
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
using PanelMicrotile = void (*)(const T*, i64, const int32_t*, const T*, i64, const Results<T>&, i64);

template <typename T>
struct PanelMicrotiles {
  template <int M>
  struct One {
    static constexpr PanelMicrotile<T> function = multiply_panel_microtile<T, M, 1>;
  };
  template <int M>
  struct Two {
    static constexpr PanelMicrotile<T> function = multiply_panel_microtile<T, M, 2>;
  };
  template <int M>
  struct Three {
    static constexpr PanelMicrotile<T> function = multiply_panel_microtile<T, M, 3>;
  };
};

// a[rows, length] times panel[length, vectors]. after(first row, count): called when a microtile is done.
template <typename T, typename F>
void multiply_panel(const T* a, i64 lda, i64 rows, const int32_t* steps, const T* panel, int vectors, i64 length,
                    const Results<T>& to, const F& after) {
  using Of = PanelMicrotiles<T>;
  using Function = PanelMicrotile<T>;
  static constexpr const Function* kMicrotiles[] = {kMicrotilesOf<Function, Of::template One, 1>.data(),
                                                    kMicrotilesOf<Function, Of::template Two, 2>.data(),
                                                    kMicrotilesOf<Function, Of::template Three, 3>.data()};
  for_each_microtile(rows, vectors, [&](i64 row, i64 now) {
    kMicrotiles[vectors - 1][now - 1](a + row * lda, lda, steps, panel, length, to, row);
    after(row, now);
  });
}

}  // namespace DYCONVERT_TARGET
