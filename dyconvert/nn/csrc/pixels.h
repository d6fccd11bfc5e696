// The output's pixels in vectors, and how results are written to them.
#pragma once
#include "problem.h"

namespace dyconvert {

template <typename T>
class Pixels {
 public:
  // pitch: elements from one row of what is read to the next, where a pixel of the output is an element.
  Pixels(const Shape& shape, i64 pitch) : shape_(shape) {
    const i64 height = shape.out_height, width = shape.out_width;
    // Rows that lie without a gap are as one.
    if (pitch == width)
      arrange_rows(1, height * width, pitch);
    else if (height * divided_up(width, kLanes<T>) <= divided_up((height - 1) * pitch + width, kLanes<T>))
      arrange_rows(height, width, pitch);
    else
      arrange_plane(pitch);
  }

  i64 vectors() const { return start_.size(); }
  // Where a vector starts in what is read.
  i64 start(i64 vector) const { return start_[vector]; }

  // Write `vectors` vectors of results of `rows` output channels, from the vector `first` on.
  // sums: [rows, vectors], and a vector more that may be read.
  void write(const T* sums, i64 rows, i64 first, i64 vectors, const T* added, T* out) const {
    const Shape& s = shape_;
    const Run* begin = runs_.data() + runs_of_[first];
    const Run* end = runs_.data() + runs_of_[first + vectors];
    const i64 base = first * kLanes<T>;
    for (i64 m = 0; m < rows; m++, sums += vectors * kLanes<T>) {
      T* row = out + m * s.out_channel;
      for (const Run* run = begin; run < end; run++) {
        const T* from = sums + run->lane - base;
        if (s.out_pixel == 1 && run->pixel + kLanes<T> <= s.pixels())
          store(row + run->pixel, load(from) + added[m]);  // what is too much is written over by the next run
        else
          for (i64 i = 0; i < run->count; i++) row[(run->pixel + i) * s.out_pixel] = from[i] + added[m];
      }
    }
  }

  // Fetch what `write` is going to write to: of a line, it writes only a part.
  void prefetch(i64 rows, i64 first, i64 vectors, T* out) const {
    const i64 begin = runs_[runs_of_[first]].pixel * shape_.out_pixel;
    const Run& last = runs_[runs_of_[first + vectors] - 1];
    const i64 end = (last.pixel + last.count - 1) * shape_.out_pixel;
    for (i64 m = 0; m < rows; m++) {
      __builtin_prefetch(out + m * shape_.out_channel + begin, 1);
      __builtin_prefetch(out + m * shape_.out_channel + end, 1);
    }
  }

 private:
  // Lanes [lane, lane + count), counted from the first vector on, are pixels [pixel, pixel + count) of the output.
  struct Run {
    int32_t lane, pixel, count;
  };

  void add_vector(i64 start) {
    start_.push_back(start);
    runs_of_.push_back(runs_.size());
  }

  // Each row by itself. Its last vector ends with it, and does some pixels again.
  void arrange_rows(i64 rows, i64 length, i64 pitch) {
    runs_of_.assign(1, 0);
    for (i64 row = 0; row < rows; row++)
      for (i64 x = 0; x < length; x += kLanes<T>) {
        const i64 from = max<i64>(0, min(x, length - kLanes<T>));
        const i64 lane = start_.size() * kLanes<T>;
        runs_.push_back({int32_t(lane), int32_t(row * length + from), int32_t(min(length, kLanes<T>))});
        add_vector(row * pitch + from);
      }
  }

  // The plane from end to end; what lies between rows is computed and dropped.
  void arrange_plane(i64 pitch) {
    const i64 height = shape_.out_height, width = shape_.out_width;
    runs_of_.assign(1, 0);
    for (i64 lane = 0; lane < (height - 1) * pitch + width; lane += kLanes<T>) {
      for (i64 at = lane; at < lane + kLanes<T>;) {
        const i64 y = at / pitch, x = at % pitch, end = min(y * pitch + width, lane + kLanes<T>);
        if (y < height && at < end) runs_.push_back({int32_t(at), int32_t(y * width + x), int32_t(end - at)});
        at = max(at + 1, x < width ? end : min((y + 1) * pitch, lane + kLanes<T>));
      }
      add_vector(lane);
    }
  }

  const Shape& shape_;
  std::vector<int32_t> start_, runs_of_;
  std::vector<Run> runs_;
};

}  // namespace dyconvert
