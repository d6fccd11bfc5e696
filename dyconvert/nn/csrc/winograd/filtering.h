// Winograd's minimal filtering (Lavin and Gray 2016, eq. 8): m x m outputs of a 3 x 3 conv of stride 1 are
//   y = A^T [ (G g G^T) * (B^T d B) ] A,
// with (m + 2)^2 multiplications in place of 9 m^2. Here are the matrices; each is applied along both axes.
#pragma once
#include "base/vector.h"

namespace DYCONVERT_TARGET {

// m = 4, with the points 0, +-1 / sqrt 2, +-sqrt 2. In float32 their error is half that of the usual points 0, +-1,
// +-2, and twice that of the conv without Winograd's filtering.
struct Winograd {
  static constexpr int tile = 4, size = 6, elements = size * size;
  static constexpr double kRoot = 1.4142135623730950488;
  // B^T
  template <typename V>
  static void input(const V (&d)[6], V (&v)[6]) {
    using T = Element<V>;
    const V even1 = d[4] - T(2) * d[2], odd1 = T(kRoot / 2) * d[3] - T(kRoot) * d[1];
    const V even2 = d[4] - T(0.5) * d[2], odd2 = T(kRoot) * d[3] - T(kRoot / 2) * d[1];
    v[0] = d[0] + d[4] - T(2.5) * d[2];
    v[1] = even1 + odd1;
    v[2] = even1 - odd1;
    v[3] = even2 + odd2;
    v[4] = even2 - odd2;
    v[5] = d[1] + d[5] - T(2.5) * d[3];
  }
  // G
  template <typename V>
  static void kernel(const V (&g)[3], V (&u)[6]) {
    using T = Element<V>;
    const V even1 = T(-2. / 3) * g[0] - T(1. / 3) * g[2], odd1 = T(kRoot / 3) * g[1];
    const V even2 = T(1. / 6) * g[0] + T(1. / 3) * g[2], odd2 = T(kRoot / 6) * g[1];
    u[0] = g[0];
    u[1] = even1 - odd1;
    u[2] = even1 + odd1;
    u[3] = even2 + odd2;
    u[4] = even2 - odd2;
    u[5] = g[2];
  }
  // A^T
  template <typename V>
  static void output(const V (&s)[6], V (&y)[4]) {
    using T = Element<V>;
    const V even1 = s[1] + s[2], odd1 = s[1] - s[2], even2 = s[3] + s[4], odd2 = s[3] - s[4];
    y[0] = s[0] + even1 + even2;
    y[1] = T(kRoot / 2) * odd1 + T(kRoot) * odd2;
    y[2] = T(0.5) * even1 + T(2) * even2;
    y[3] = T(kRoot / 4) * odd1 + T(2 * kRoot) * odd2 + s[5];
  }
  // A, for gradients
  template <typename V>
  static void output_gradient(const V (&y)[4], V (&s)[6]) {
    using T = Element<V>;
    const V even1 = y[0] + T(0.5) * y[2], odd1 = T(kRoot / 2) * y[1] + T(kRoot / 4) * y[3];
    const V even2 = y[0] + T(2) * y[2], odd2 = T(kRoot) * y[1] + T(2 * kRoot) * y[3];
    s[0] = y[0];
    s[1] = even1 + odd1;
    s[2] = even1 - odd1;
    s[3] = even2 + odd2;
    s[4] = even2 - odd2;
    s[5] = y[3];
  }
  // G^T
  template <typename V>
  static void kernel_gradient(const V (&u)[6], V (&g)[3]) {
    using T = Element<V>;
    const V even1 = u[1] + u[2], odd1 = u[2] - u[1], even2 = u[3] + u[4], odd2 = u[3] - u[4];
    g[0] = u[0] - T(2. / 3) * even1 + T(1. / 6) * even2;
    g[1] = T(kRoot / 3) * odd1 + T(kRoot / 6) * odd2;
    g[2] = T(1. / 3) * (even2 - even1) + u[5];
  }
};

// Calls put(i, j, element) for all elements of M d M^T. along: multiplies a column by M.
template <int from_size, int to_size, typename V, typename Along, typename Put>
inline void both_axes(const V (&d)[from_size][from_size], const Along& along, const Put& put) {
  V half[to_size][from_size];
#pragma GCC unroll 6
  for (int j = 0; j < from_size; j++) {
    V column[from_size], result[to_size];
#pragma GCC unroll 6
    for (int i = 0; i < from_size; i++) column[i] = d[i][j];
    along(column, result);
#pragma GCC unroll 6
    for (int i = 0; i < to_size; i++) half[i][j] = result[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < to_size; i++) {
    V result[to_size];
    along(half[i], result);
#pragma GCC unroll 6
    for (int j = 0; j < to_size; j++) put(i, j, result[j]);
  }
}

}  // namespace DYCONVERT_TARGET
