// Convs of one plane, with the kernel as columns of taps. Taps of a column read rows of the input one below the other:
// so a row is loaded once and used by all of them, by each for another row of the result.
#pragma once
#include "depthwise/input.h"
#include "base/phases.h"

namespace DYCONVERT_TARGET {

// The most taps of a column, and rows of the result at a time, that sixteen registers have room for.
constexpr i64 kColumn = 7, kTall = 8;

struct Column {
  int32_t offset, down, right;  // `Place` of the first tap, counted from the pixel
  int32_t weight;               // where the first tap is in the kernel
  int32_t apart;                // from a tap to the next, which reads one row further down
  int32_t taps;
};

// A phase as these convs take it: pixels of the result that have the same taps, and where they are written to.
struct Field {
  i64 height, width;
  i64 at, row, column;  // the first pixel, and strides
  i64 tall = divided_up(height, divided_up(height, kTall));  // rows at a time
  std::vector<Column> columns = {};

  // Adds a column of `taps` taps; the first is at `place` and has the weight `weight`.
  template <typename T>
  void add(const Input<T>& input, Place place, i64 weight, i64 apart, i64 taps) {
    for (; taps > 0; taps -= kColumn) {
      const i64 now = min(taps, kColumn);
      columns.push_back({int32_t(place.offset), int32_t(place.down), int32_t(place.right), int32_t(weight),
                         int32_t(apart), int32_t(now)});
      // Microtiles could lie in padding entirely: so rows are computed one by one, each checked for being inside.
      if (place.down < 1 - now || place.down + height > input.height) tall = 1;
      place.offset += kColumn * input.pitch;
      place.down += kColumn;
      weight += kColumn * apart;
    }
  }
};

// Whether all taps of a kernel that are one below the other are one column. Then only its first rows can lie above a
// plane, and only its last rows below.
inline bool whole_columns(const Shape& s) { return s.dilation_y == 1 && s.kernel_height <= kColumn; }

// Rows of the kernel from a tap to the one that reads one row further down; kernel_height if there is none.
inline i64 taps_apart(const Shape& s) {
  return s.stride_y % s.dilation_y == 0 ? s.stride_y / s.dilation_y : s.kernel_height;
}

// Adds a field. A field of a single row is split into rows of a vector's width, so that microtiles have several rows.
template <typename T>
void add_field(std::vector<Field>& fields, const Input<T>& input, Field field) {
  constexpr i64 n = kLanes<T>;
  const i64 rows = field.width / n, rest = field.width % n;
  if (input.flat && rows > 0) {
    fields.push_back({rows, n, field.at, n * field.column, field.column});
    fields.back().columns = field.columns;
    if (rest == 0) return;
    field.width = rest;
    field.at += rows * n * field.column;
    for (Column& column : field.columns) column.offset += rows * n;
  }
  fields.push_back(field);
}

template <typename T>
std::vector<Field> fields_of_conv(const Shape& s, const Input<T>& input) {
  Field field{s.out_height, s.out_width, 0, s.out_width * s.out_pixel, s.out_pixel};
  const i64 apart = taps_apart(s);
  for (i64 y = 0; y < min(apart, s.kernel_height); y++)
    for (i64 x = 0; x < s.kernel_width; x++)
      field.add(input, input.place(0, y * s.dilation_y, x * s.dilation_x), y * s.kernel_width + x,
                apart * s.kernel_width, divided_up(s.kernel_height - y, apart));
  std::vector<Field> fields;
  add_field(fields, input, field);
  return fields;
}

// The fields of the input's gradient, one for each phase of the stride: each phase has its own taps, and a tap further
// down in the kernel reads further up. The sum goes over the input channel's output channels, whose planes and kernels
// lie one behind the other.
template <typename T>
std::vector<Field> fields_of_gradient(const Shape& s, const Input<T>& input) {
  const Reach down = reach_y(s), right = reach_x(s);
  const i64 first_y = down.first(s.height), first_x = right.first(s.width), apart = taps_apart(s);
  std::vector<Field> fields;
  for (i64 phase_y = 0; phase_y < min(s.stride_y, s.height); phase_y++)
    for (i64 phase_x = 0; phase_x < min(s.stride_x, s.width); phase_x++) {
      Field field{divided_up(s.height - phase_y, s.stride_y), divided_up(s.width - phase_x, s.stride_x),
                  phase_y * s.width + phase_x, s.stride_y * s.width, s.stride_x};
      for (i64 channel = 0; channel < s.group_out(); channel++)
        for (i64 y = 0; y < min(apart, s.kernel_height); y++)
          for (i64 x = 0; x < s.kernel_width; x++) {
            if (!down.meets(phase_y, y) || !right.meets(phase_x, x)) continue;
            const i64 taps = divided_up(s.kernel_height - y, apart), last = y + (taps - 1) * apart;
            field.add(input,
                      input.place(channel, down.of(phase_y, last) - first_y, right.of(phase_x, x) - first_x),
                      channel * s.taps() + last * s.kernel_width + x, -apart * s.kernel_width, taps);
          }
      add_field(fields, input, field);
    }
  return fields;
}

// sums[r] += sum_t weights[t] * (row r + t that the column reads), for all columns of `Taps` taps. Returns the first
// column with another number of taps.
template <typename T, int Rows, int Taps>
inline const Column* add_columns(Vector<T>* sums, const Column* column, const Column* last, const T* kernel,
                                 const T* plane, const T* mask, i64 pitch, i64 y, i64 height) {
  do {
    Vector<T> weights[Taps];
    const T* weight = kernel + column->weight;
#pragma GCC unroll 8
    for (int t = 0; t < Taps; t++, weight += column->apart) weights[t] = broadcast(*weight);
    const T* from = plane + column->offset;
    const Vector<T> inside = load(mask + column->right);
    // Rows above and below the plane are skipped. With several rows, only the first and last can be (`Field::tall`).
    const int top = -int(y) - column->down, bottom = int(height) + top;
#pragma GCC unroll 16
    for (int r = 0; r < Rows + Taps - 1; r++, from += pitch) {
      if ((r < Taps - 1 || Rows == 1) && r < top) continue;
      if ((r >= Rows || Rows == 1) && r >= bottom) continue;
      const Vector<T> row = bitwise_and(load(from), inside);
#pragma GCC unroll 8
      for (int t = 0; t < Taps; t++)
        if (r - t >= 0 && r - t < Rows) sums[r - t] += weights[t] * row;
    }
  } while (++column < last && column->taps == Taps);
  return column;
}

// The first `count` elements of a vector, `step` apart.
template <typename T>
inline void store_some(T* to, Vector<T> elements, i64 count, i64 step) {
  if (step == 1 && count < kLanes<T>)
    copy_few(to, reinterpret_cast<const T*>(&elements), count);
  else
    for (i64 i = 0; i < count; i++) to[i * step] = elements[i];
}

// Channels that are convolved one after the other, each with its own kernel.
template <typename T>
struct Channels {
  i64 count;
  const T* planes;
  i64 plane;  // from one channel to the next; so are kernel and channel
  const T* kernels;
  i64 kernel;
  const T* bias;
  T* out;
  i64 channel;
};

// Computes `Rows` rows of the channels' results from `y` on.
template <typename T, int Rows>
void convolve_rows(const Input<T>& input, const Field& field, const Channels<T>& channels, i64 y) {
  const Column* first = field.columns.data();
  const Column* last = first + field.columns.size();
  const i64 width = field.width, down = field.row, right = field.column, many = min(width, kLanes<T>);
  const i64 pitch = input.pitch, height = input.height;
  const T* mask = input.mask();
  const T* plane = channels.planes + y * pitch;
  const T* kernel = channels.kernels;
  T* out = channels.out + field.at + y * down;
  // Rows that are written as whole vectors. A narrow row's vector writes beyond it; the next row writes over that, so
  // the last rows can't be written so.
  i64 whole = 0;
  if (right == 1 && many == kLanes<T>)
    whole = Rows;
  else if (right == 1 && down == width)
    whole = max<i64>(0, min<i64>(Rows, field.height - y + 1 - divided_up(kLanes<T>, width)));
  for (i64 c = 0; c < channels.count; c++) {
    for (i64 left = 0; left < width; left += kLanes<T>) {
      const i64 x = min(left, width - many);  // the last vector ends with the row
      Vector<T> sums[Rows];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; r++) sums[r] = broadcast(channels.bias[c]);
      for (const Column* column = first; column < last;) {
        switch (column->taps) {
#define DYCONVERT_TAPS(n) \
  column = add_columns<T, Rows, n>(sums, column, last, kernel, plane + x, mask + x, pitch, y, height)
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
      T* to = out + x * right;
      if (whole == Rows) {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++, to += down) store(to, sums[r]);
        continue;
      }
#pragma GCC unroll 8
      for (int r = 0; r < Rows; r++, to += down)
        if (r < whole)
          store(to, sums[r]);
        else
          store_some(to, sums[r], many, right);
    }
    plane += channels.plane;
    kernel += channels.kernel;
    out += channels.channel;
  }
}

template <typename T>
void convolve(const Input<T>& input, const Field& field, const Channels<T>& channels) {
  static constexpr decltype(&convolve_rows<T, 1>) kRowsOf[] = {
      convolve_rows<T, 1>, convolve_rows<T, 2>, convolve_rows<T, 3>, convolve_rows<T, 4>,
      convolve_rows<T, 5>, convolve_rows<T, 6>, convolve_rows<T, 7>, convolve_rows<T, 8>};
  for (i64 y = 0; y < field.height; y += field.tall)
    kRowsOf[min(field.tall, field.height - y) - 1](input, field, channels, y);
}

}  // namespace DYCONVERT_TARGET
