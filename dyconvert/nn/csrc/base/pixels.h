// Splits the output's pixels into vectors, and writes vectors of results to them.
#pragma once
#include "base/problem.h"

namespace DYCONVERT_TARGET {

// Where pixels of the result are written to.
struct Grid {
  i64 height, width;
  i64 channel, row, column;  // strides
};

template <typename T>
class Pixels {
 public:
  // pitch: elements from one row of the layout that is read to the next, where each pixel of the output is one element.
  Pixels(const Grid& grid, i64 pitch) : grid_(grid), pitch_(pitch) {
    const i64 height = grid.height, width = grid.width, last = (height - 1) * pitch + width;
    if (pitch == width && last >= kLanes<T>)  // without gaps; the last vector ends with the plane
      for (i64 at = 0; at < last; at += kLanes<T>) add(min(at, last - kLanes<T>), false);
    else if (height * divided_up(width, kLanes<T>) > divided_up(last, kLanes<T>))  // the plane from end to end
      for (i64 at = 0; at < last; at += kLanes<T>) add(at, false);
    else  // each row by itself; its last vector ends with it
      for (i64 y = 0; y < height; y++)
        for (i64 x = 0; x < width; x += kLanes<T>) add(y * pitch + max<i64>(0, min(x, width - kLanes<T>)), true);
    runs_of_.push_back(runs_.size());
  }

  i64 vectors() const { return start_.size(); }
  // Where a vector starts in the layout that is read.
  i64 start(i64 vector) const { return start_[vector]; }

  // Whether all vectors are whole, and their pixels are written at one distance from each other.
  bool regular() const {
    return pitch_ == grid_.width && grid_.row == grid_.width * grid_.column && grid_.height * grid_.width >= kLanes<T>;
  }
  i64 distance() const { return grid_.column; }

  // Write `vectors` vectors of results of `rows` output channels, from the vector `first` on.
  // sums: [rows, vectors], and a vector more that may be read.
  void write(const T* sums, i64 rows, i64 first, i64 vectors, const T* bias, T* out) const {
    const i64 end_of_plane = grid_.row == grid_.width ? grid_.height * grid_.width : 0;
    const Run* begin = runs_.data() + runs_of_[first];
    const Run* end = runs_.data() + runs_of_[first + vectors];
    const i64 base = first * kLanes<T>;
    for (i64 m = 0; m < rows; m++, sums += vectors * kLanes<T>) {
      T* plane = out + m * grid_.channel;
      for (const Run* run = begin; run < end; run++) {
        const T* from = sums + run->lane - base;
        // The store may write lanes beyond this run: the next run writes over them.
        if (grid_.column == 1 && (run->count == kLanes<T> || run->at + kLanes<T> <= end_of_plane))
          store(plane + run->at, load(from) + bias[m]);
        else
          for (i64 i = 0; i < run->count; i++) plane[run->at + i * grid_.column] = from[i] + bias[m];
      }
    }
  }

  // Fetch the cache lines that `write` is going to write to: it writes only some bytes of a line, so each is read
  // first.
  void prefetch(i64 rows, i64 first, i64 vectors, T* out) const {
    const i64 begin = runs_[runs_of_[first]].at;
    const Run& last = runs_[runs_of_[first + vectors] - 1];
    const i64 end = last.at + (last.count - 1) * grid_.column;
    for (i64 m = 0; m < rows; m++) {
      __builtin_prefetch(out + m * grid_.channel + begin, 1);
      __builtin_prefetch(out + m * grid_.channel + end, 1);
    }
  }

 private:
  // Lanes [lane, lane + count), counted from the first vector on, are neighbouring pixels of one row; the first is
  // written to `at`.
  struct Run {
    int32_t lane, at, count;
  };

  // Adds the vector that starts at element `start` of the layout. Lanes between two rows get no run; with one_row,
  // neither do lanes of the next row.
  void add(i64 start, bool one_row) {
    const i64 lane = start_.size() * kLanes<T>;
    const bool joined = pitch_ == grid_.width && grid_.row == grid_.width * grid_.column;
    start_.push_back(start);
    runs_of_.push_back(runs_.size());
    for (i64 at = start; at < start + kLanes<T>;) {
      const i64 y = at / pitch_, x = at % pitch_;
      if (y >= grid_.height) return;
      const i64 row_end = joined ? grid_.height * grid_.width : y * pitch_ + grid_.width;
      const i64 end = min(row_end, start + kLanes<T>);
      if (x < grid_.width)
        runs_.push_back({int32_t(lane + at - start), int32_t(y * grid_.row + x * grid_.column), int32_t(end - at)});
      if (one_row) return;
      at = joined ? start + kLanes<T> : (y + 1) * pitch_;
    }
  }

  const Grid grid_;
  const i64 pitch_;
  std::vector<int32_t> start_, runs_of_;
  std::vector<Run> runs_;
};

}  // namespace DYCONVERT_TARGET
