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
class Rows {
 public:
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
    if (channel_ == 1)
      for (const Run& run : runs_)
        for (i64 i = 0; i < run.count; i++)
          for (i64 c = 0; c < channels; c++) planes[c * plane_ + run.to + i] = x[run.from + i * step_ + c];
    else
      for (i64 c = 0; c < channels; c++) lay_out_plane(x + c * channel_, planes + c * plane_);
  }

 private:
  struct Run {
    int32_t from, to, count;
  };

  void lay_out_plane(const T* x, T* plane) const {
    for (const Run& run : runs_) {
      const T* from = x + run.from;
      T* to = plane + run.to;
      if (step_ == 1 && run.count < kLanes<T>)
        copy_few(to, from, run.count);
      else if (step_ == 1)
        copy(to, from, run.count);
      else if (step_ == 2)
        copy_every_other(to, from, run.count);
      else
        for (i64 i = 0; i < run.count; i++) to[i] = from[i * step_];
    }
  }

  std::vector<Run> runs_;
  i64 step_, channel_, plane_;  // strides
};

}  // namespace dyconvert
