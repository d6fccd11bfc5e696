// The output's pixels in vectors, and how results are written to them.
#pragma once
#include "problem.h"

namespace dyconvert {

template <typename T>
class Pixels {
 public:
  // pitch: elements from one row of what is read to the next, where a pixel of the output is an element.
  Pixels(const Shape& shape, i64 pitch) : shape_(shape), pitch_(pitch) { arrange(); }

  i64 vectors() const { return start_.size(); }
  i64 start(i64 vector) const { return start_[vector]; }
  // The pixel of a vector's lane, or -1.
  i64 pixel(i64 vector, i64 lane) const {
    return lanes_.empty() ? pixel_[vector] + lane : lanes_[vector * kLanes<T> + lane];
  }
  // Whether a vector's pixels follow one another.
  bool dense() const { return lanes_.empty(); }

  // Write `vectors` vectors of results of `rows` output channels, from the vector `first` on. sums: [rows, ld].
  void write(const T* sums, i64 ld, i64 rows, i64 first, i64 vectors, const T* added, T* out) const {
    const Shape& s = shape_;
    for (i64 m = 0; m < rows; m++) {
      T* row = out + m * s.out_channel;
      for (i64 j = 0; j < vectors; j++) {
        const T* from = sums + m * ld + j * kLanes<T>;
        const i64 v = first + j;
        if (s.out_pixel == 1 && dense()) {
          store(row + pixel_[v], load(from) + added[m]);
        } else if (s.out_pixel == 1 && by_rows_ && v * s.out_width + kLanes<T> <= s.pixels()) {
          // What is too much is the next row's, which is written next.
          store(row + v * s.out_width, load(from) + added[m]);
        } else {
          for (i64 lane = 0; lane < kLanes<T>; lane++)
            if (const i64 at = pixel(v, lane); at >= 0) row[at * s.out_pixel] = from[lane] + added[m];
        }
      }
    }
  }

  // Fetch what `write` is going to write to: of a row's line, it writes only a part.
  void prefetch(i64 rows, i64 first, i64 vectors, T* out) const {
    if (!lanes_.empty()) return;
    const i64 begin = pixel_[first] * shape_.out_pixel, end = (pixel_[first + vectors - 1] + kLanes<T>) * shape_.out_pixel - 1;
    for (i64 m = 0; m < rows; m++) {
      __builtin_prefetch(out + m * shape_.out_channel + begin, 1);
      __builtin_prefetch(out + m * shape_.out_channel + end, 1);
    }
  }

 private:
  // Which pixels a vector has. Rows of at least a vector: the last vector of a row ends with it, and does some pixels
  // again. Shorter ones: a row each, or the plane from end to end, and what lies between rows is dropped.
  void arrange() {
    const Shape& s = shape_;
    const bool joined = pitch_ == s.out_width;
    const i64 rows = joined ? 1 : s.out_height, length = joined ? s.pixels() : s.out_width;
    if (length >= kLanes<T>) {
      for (i64 row = 0; row < rows; row++)
        for (i64 x = 0; x < length; x += kLanes<T>) {
          const i64 from = min(x, length - kLanes<T>);
          start_.push_back(row * pitch_ + from);
          pixel_.push_back(row * s.out_width + from);
        }
      return;
    }
    const i64 flat = divided_up((s.out_height - 1) * pitch_ + s.out_width, kLanes<T>);
    by_rows_ = s.out_height <= flat;
    for (i64 v = 0; v < min(flat, s.out_height); v++) {
      start_.push_back(by_rows_ ? v * pitch_ : v * kLanes<T>);
      for (i64 lane = 0; lane < kLanes<T>; lane++) {
        const i64 y = by_rows_ ? v : (v * kLanes<T> + lane) / pitch_;
        const i64 x = by_rows_ ? lane : (v * kLanes<T> + lane) % pitch_;
        lanes_.push_back(x < s.out_width && y < s.out_height ? y * s.out_width + x : -1);
      }
    }
  }

  const Shape& shape_;
  i64 pitch_;
  bool by_rows_ = false;
  std::vector<int32_t> start_, pixel_, lanes_;
};

}  // namespace dyconvert
