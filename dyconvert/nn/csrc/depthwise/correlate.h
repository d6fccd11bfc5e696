// The gradient of one plane's kernel: for each tap, the sum over all pixels of the output's gradient times the input
// that the tap reads. As in the conv, taps are taken by columns; here rows of the gradient are in registers.
#pragma once
#include "depthwise/columns.h"
#include "base/transpose.h"

namespace DYCONVERT_TARGET {

// sums[tap] += row r of the gradient times row r + t of the input that the column reads, for all columns of `Taps`
// taps. Returns the first column with another number of taps.
template <typename T, int Rows, int Taps>
inline const Column* correlate_columns(const Vector<T>* gradient, const Column* column, const Column* last,
                                       const T* plane, const T* mask, i64 pitch, i64 y, i64 height, T* sums) {
  do {
    T* to = sums + column->weight * kLanes<T>;
    const i64 apart = column->apart * kLanes<T>;
    Vector<T> tap_sums[Taps];
#pragma GCC unroll 8
    for (int t = 0; t < Taps; t++) tap_sums[t] = load(to + t * apart);
    const T* from = plane + column->offset;
    const Vector<T> inside = load(mask + column->right);
    const int top = -int(y) - column->down, bottom = int(height) + top;
#pragma GCC unroll 16
    for (int r = 0; r < Rows + Taps - 1; r++, from += pitch) {
      if ((r < Taps - 1 || Rows == 1) && r < top) continue;
      if ((r >= Rows || Rows == 1) && r >= bottom) continue;
      const Vector<T> row = bitwise_and(load(from), inside);
#pragma GCC unroll 8
      for (int t = 0; t < Taps; t++)
        if (r - t >= 0 && r - t < Rows) tap_sums[t] += gradient[r - t] * row;
    }
#pragma GCC unroll 8
    for (int t = 0; t < Taps; t++) store(to + t * apart, tap_sums[t]);
  } while (++column < last && column->taps == Taps);
  return column;
}

// Takes `Rows` rows of the output's gradient from `y` on. The gradient may be read up to `end`.
template <typename T, int Rows>
void correlate_rows(const Input<T>& input, const Field& field, const T* plane, const T* gradient, const T* end, i64 y,
                    T* sums) {
  constexpr i64 n = kLanes<T>;
  const Column* first = field.columns.data();
  const Column* last = first + field.columns.size();
  const i64 width = field.width, many = min(width, n), pitch = input.pitch, height = input.height;
  const T* mask = input.mask();
  plane += y * pitch;
  gradient += field.at + y * width;
  for (i64 left = 0; left < width; left += n) {
    const i64 x = min(left, width - many);  // the last vector ends with the row
    // Lanes that the vector before it had are masked out.
    const Vector<T> counts = window<T>(left - x, many);
    Vector<T> rows[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
      const T* from = gradient + r * width + x;
      T few[n] = {};
      if (from + n > end) {
        copy_few(few, from, many);
        from = few;
      }
      rows[r] = bitwise_and(load(from), counts);
    }
    for (const Column* column = first; column < last;) {
      switch (column->taps) {
#define DYCONVERT_TAPS(n) \
  column = correlate_columns<T, Rows, n>(rows, column, last, plane + x, mask + x, pitch, y, height, sums)
        case 1: DYCONVERT_TAPS(1); break;
        case 2: DYCONVERT_TAPS(2); break;
        case 3: DYCONVERT_TAPS(3); break;
        case 4: DYCONVERT_TAPS(4); break;
        case 5: DYCONVERT_TAPS(5); break;
        case 6: DYCONVERT_TAPS(6); break;
        default: DYCONVERT_TAPS(7);
#undef DYCONVERT_TAPS
      }
    }
  }
}

// sums: [taps], vectors; a tap's gradient is the sum of its vector's elements.
template <typename T>
void correlate(const Input<T>& input, const std::vector<Field>& fields, const T* plane, const T* gradient, const T* end,
               i64 taps, T* sums) {
  static constexpr decltype(&correlate_rows<T, 1>) kRowsOf[] = {
      correlate_rows<T, 1>, correlate_rows<T, 2>, correlate_rows<T, 3>, correlate_rows<T, 4>,
      correlate_rows<T, 5>, correlate_rows<T, 6>, correlate_rows<T, 7>, correlate_rows<T, 8>};
  std::fill(sums, sums + taps * kLanes<T>, T(0));
  for (const Field& field : fields)
    for (i64 y = 0; y < field.height; y += field.tall)
      kRowsOf[min(field.tall, field.height - y) - 1](input, field, plane, gradient, end, y, sums);
}

// to[i] = sum of the elements of vectors[i]: as many vectors at once as a vector has lanes, by transposing them.
template <typename T>
void sum_vectors(const T* vectors, i64 count, T* to) {
  constexpr i64 n = kLanes<T>;
  i64 at = 0;
  for (; at + n <= count; at += n, vectors += n * n) {
    Vector<T> sum = {};
    for (i64 first = 0; first < n; first += 4) {
      Vector<T> columns[4];
      load_columns(vectors + first, n, columns);
      sum += (columns[0] + columns[1]) + (columns[2] + columns[3]);
    }
    store(to + at, sum);
  }
  for (; at < count; at++, vectors += n) {
    T sum = 0;
    for (i64 lane = 0; lane < n; lane++) sum += vectors[lane];
    to[at] = sum;
  }
}

}  // namespace DYCONVERT_TARGET
