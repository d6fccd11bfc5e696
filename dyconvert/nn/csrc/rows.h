// Laying out planes, with all that there is to know of where rows go worked out beforehand: of small planes that takes
// longer than copying them.
#pragma once
#include "planes.h"

namespace dyconvert {

// Fewer elements than a vector has, in two pieces that overlap.
template <typename T>
inline void copy_few(T* to, const T* from, i64 count) {
  constexpr i64 half = 16 / sizeof(T), quarter = max<i64>(1, half / 2);
  if (count >= half) {
    memcpy(to, from, half * sizeof(T));
    memcpy(to + count - half, from + count - half, half * sizeof(T));
  } else if (count >= quarter) {
    memcpy(to, from, quarter * sizeof(T));
    memcpy(to + count - quarter, from + count - quarter, quarter * sizeof(T));
  } else {
    *to = *from;
  }
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

// Half a vector.
typedef float Floats __attribute__((vector_size(16), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(16), aligned(8), may_alias));

// Every other element from the first of `a` on, of which `b` has the last. Nothing beyond it is read.
inline Vector<float> every_other(Vector<float> a, Vector<float> b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 9, 11, 13, 15);
}
inline Vector<double> every_other(Vector<double> a, Vector<double> b) {
  return __builtin_shufflevector(a, b, 0, 2, 5, 7);
}
inline void copy_half(float* to, const float* from) {
  *reinterpret_cast<Floats*>(to) = __builtin_shufflevector(
      *reinterpret_cast<const Floats*>(from), *reinterpret_cast<const Floats*>(from + 3), 0, 2, 5, 7);
}
inline void copy_half(double* to, const double* from) {
  *reinterpret_cast<Doubles*>(to) = __builtin_shufflevector(
      *reinterpret_cast<const Doubles*>(from), *reinterpret_cast<const Doubles*>(from + 1), 0, 3);
}

// Every other of 2 * count - 1 elements. The last piece ends with them.
template <typename T>
inline void copy_evens(T* to, const T* from, i64 count) {
  constexpr i64 half = kLanes<T> / 2;
  if (count >= kLanes<T>) {
    for (i64 left = 0; left < count; left += kLanes<T>) {
      const i64 at = min(left, count - kLanes<T>);
      store(to + at, every_other(load(from + 2 * at), load(from + 2 * at + kLanes<T> - 1)));
    }
  } else if (count >= half) {
    copy_half(to, from);
    copy_half(to + count - half, from + 2 * (count - half));
  } else {
    for (i64 at = 0; at < count; at++) to[at] = from[2 * at];
  }
}

template <typename T>
class Rows {
 public:
  Rows() = default;
  Rows(const Shape& s, const Planes<T>& planes)
      : step_(s.stride_x * s.x_column), channel_(s.x_channel), plane_(planes.plane) {
    // Of the padded input, what taps meet.
    const i64 height = (s.out_height - 1) * s.stride_y + (s.kernel_height - 1) * s.dilation_y + 1;
    const i64 width = (s.out_width - 1) * s.stride_x + (s.kernel_width - 1) * s.dilation_x + 1;
    const i64 phases = s.kernel_width == 1 ? 1 : s.stride_x;
    for (i64 y = max<i64>(0, s.padding_y); y < min(height, s.height + s.padding_y); y++) {
      if (s.kernel_height == 1 && y % s.stride_y) continue;
      for (i64 phase = 0; phase < phases; phase++) {
        const i64 begin = max<i64>(0, divided_up(s.padding_x - phase, s.stride_x)) * s.stride_x + phase;
        const i64 end = min(width, s.width + s.padding_x);
        if (begin < end)
          runs_.push_back({int32_t((y - s.padding_y) * s.x_row + (begin - s.padding_x) * s.x_column),
                           int32_t(planes.offset(0, y, begin)), int32_t(divided_up(end - begin, s.stride_x))});
      }
    }
  }

  // The planes of channels from `x` on, which are clear.
  void lay_out(const T* x, i64 channels, T* planes) const {
    const i64 step = step_;
    if (channel_ == 1)
      for (const Run& run : runs_)
        for (i64 i = 0; i < run.count; i++)
          for (i64 c = 0; c < channels; c++) planes[c * plane_ + run.to + i] = x[run.from + i * step_ + c];
    else if (step == 1)
      lay_out_by(copy_all<T>, x, channels, planes);
    else if (step == 2)
      lay_out_by(copy_evens<T>, x, channels, planes);
    else
      lay_out_by([step](T* to, const T* from, i64 count) { for (i64 i = 0; i < count; i++) to[i] = from[i * step]; }, x,
                 channels, planes);
  }

 private:
  struct Run {
    int32_t from, to, count;
  };

  template <typename F>
  void lay_out_by(const F& copy, const T* x, i64 channels, T* planes) const {
    const Run* first = runs_.data();
    const Run* last = first + runs_.size();
    for (i64 c = 0; c < channels; c++, x += channel_, planes += plane_)
      for (const Run* run = first; run < last; run++) copy(planes + run->to, x + run->from, run->count);
  }

  std::vector<Run> runs_;
  i64 step_ = 1, channel_ = 0, plane_ = 0;  // strides
};

}  // namespace dyconvert
