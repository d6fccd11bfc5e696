// Lays out planes as `Planes` does, with a list of copies that is made once: for small planes, finding where each row
// goes takes longer than copying it.
#pragma once
#include "base/planes.h"

namespace DYCONVERT_TARGET {

// Copies fewer than `most` elements (a power of two) as two pieces that overlap.
template <int most, typename T>
inline void copy_pieces(T* to, const T* from, i64 count) {
  constexpr i64 piece = most / 2;
  if constexpr (piece == 1) {
    *to = *from;
  } else if (count >= piece) {
    memcpy(to, from, piece * sizeof(T));
    memcpy(to + count - piece, from + count - piece, piece * sizeof(T));
  } else {
    copy_pieces<piece>(to, from, count);
  }
}
// Copies fewer elements than a vector has.
template <typename T>
inline void copy_few(T* to, const T* from, i64 count) {
  copy_pieces<kLanes<T>>(to, from, count);
}

template <typename T>
inline void copy_all(T* to, const T* from, i64 count) {
  if (count < kLanes<T>) {
    copy_few(to, from, count);
    return;
  }
  i64 at = 0;
  for (; at + kLanes<T> < count; at += kLanes<T>) store(to + at, load(from + at));
  store(to + count - kLanes<T>, load(from + count - kLanes<T>));
}

// Copies fewer than `most` pairs, first elements to `to` and second ones to `other`, as two pieces that overlap.
template <int most, typename T>
inline void copy_pairs(T* to, T* other, const T* from, i64 pairs) {
  constexpr int piece = most / 2;
  if constexpr (piece * sizeof(T) < 16) {
    for (i64 at = 0; at < pairs; at++) other[at] = from[2 * at + 1], to[at] = from[2 * at];
  } else if (pairs >= piece) {
    for (const i64 at : {i64(0), pairs - piece}) {
      const auto a = load_register<T, piece>(from + 2 * at), b = load_register<T, piece>(from + 2 * at + piece);
      store_register<T, piece>(other + at, odds(a, b));
      store_register<T, piece>(to + at, evens(a, b));
    }
  } else {
    copy_pairs<piece>(to, other, from, pairs);
  }
}

// Copies `count` elements: the first, third ... to `to`, and those between to `other`.
template <typename T>
inline void copy_apart(T* to, T* other, const T* from, i64 count) {
  const i64 pairs = count / 2;
  if (pairs >= kLanes<T>) {
    for (i64 left = 0; left < pairs; left += kLanes<T>) {
      const i64 at = min(left, pairs - kLanes<T>);  // the last vector ends with the last pair
      const Vector<T> a = load(from + 2 * at), b = load(from + 2 * at + kLanes<T>);
      store(other + at, odds(a, b));
      store(to + at, evens(a, b));
    }
  } else {
    copy_pairs<kLanes<T>>(to, other, from, pairs);
  }
  if (count % 2) to[pairs] = from[2 * pairs];
}

template <typename T>
class Rows {
 public:
  Rows() = default;
  Rows(const Shape& s, const Planes<T>& planes)
      : stride_(s.stride_x), column_(s.x_column), channel_(s.x_channel), plane_(planes.plane) {
    // Rows and columns of the padded input that taps read.
    const i64 height = (s.out_height - 1) * s.stride_y + (s.kernel_height - 1) * s.dilation_y + 1;
    const i64 width = (s.out_width - 1) * s.stride_x + (s.kernel_width - 1) * s.dilation_x + 1;
    const i64 phases = s.kernel_width == 1 ? 1 : s.stride_x;
    const i64 first = max<i64>(0, s.padding_x), end = min(width, s.width + s.padding_x);
    for (i64 y = max<i64>(0, s.padding_y); y < min(height, s.height + s.padding_y); y++) {
      if (s.kernel_height == 1 && y % s.stride_y) continue;
      const i64 row = (y - s.padding_y) * s.x_row;
      for (i64 x = first; x < min(first + s.stride_x, end); x++)
        if (phases > 1 || x % s.stride_x == 0)
          copies_.push_back({int32_t(row + (x - s.padding_x) * s.x_column), int32_t(planes.offset(0, y, x)),
                           int32_t(divided_up(end - x, s.stride_x))});
    }
    together_ = stride_ == 2 && phases == 2 && column_ == 1 && end - first > 1;
  }

  // Fills the planes of `channels` channels from `x` on. Their padding is zero already.
  void lay_out(const T* x, i64 channels, T* planes) const {
    const Copy* first = copies_.data();
    const Copy* last = first + copies_.size();
    const i64 step = stride_ * column_;
    if (channel_ == 1) {  // with channels last, a line of the cache has several channels of one pixel
      for (const Copy* copy = first; copy < last; copy++)
        for (i64 i = 0; i < copy->count; i++)
          for (i64 c = 0; c < channels; c++) planes[c * plane_ + copy->to + i] = x[copy->from + i * step + c];
      return;
    }
    for (i64 c = 0; c < channels; c++, x += channel_, planes += plane_) {
      if (together_)
        for (const Copy* copy = first; copy < last; copy += 2)
          copy_apart(planes + copy[0].to, planes + copy[1].to, x + copy->from, copy[0].count + copy[1].count);
      else if (step == 1)
        for (const Copy* copy = first; copy < last; copy++) copy_all(planes + copy->to, x + copy->from, copy->count);
      else
        for (const Copy* copy = first; copy < last; copy++)
          for (i64 i = 0; i < copy->count; i++) planes[copy->to + i] = x[copy->from + i * step];
    }
  }

 private:
  // Elements of one phase of one row.
  struct Copy {
    int32_t from, to, count;
  };

  std::vector<Copy> copies_;
  i64 stride_ = 1, column_ = 1, channel_ = 0, plane_ = 0;  // strides
  bool together_ = false;  // whether a row's two phases are copied in one go
};

}  // namespace DYCONVERT_TARGET
