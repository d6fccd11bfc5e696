// How the input of a 1 x 1 conv lies while it is convolved: a few vectors of pixels, channel by channel. In the input
// itself channels lie far apart, and their pixels would share the cache's few places.
#pragma once
#include "multiply.h"
#include "pixels.h"

namespace dyconvert {

template <typename T>
class Panels {
 public:
  explicit Panels(const Shape& s)
      : image(s.in_channels * divided_up(s.pixels(), kLanes<T>) * kLanes<T>), pixels(s, s.out_width), shape_(s) {
    for (i64 v = 0; v < pixels.vectors(); v += vectors_together(pixels.vectors() - v)) firsts_.push_back(v);
    for (int together = 1; together <= kTogether; together++)
      for (i64 c = 0; c < s.group_in(); c++) offsets_[together - 1].push_back(c * together * kLanes<T>);
  }

  i64 scratch_elements(i64 images) const { return images * image; }

  void lay_out_images(const T* x, i64 images, T* panels, ParallelFor parallel_for) const {
    const i64 count = firsts_.size();
    const i64 grain = max<i64>(1, 8192 / (shape_.in_channels * kTogether * kLanes<T>));
    parallel(parallel_for, images * count, grain, [&](i64 begin, i64 end) {
      for (i64 at = begin; at < end; at++) lay_out(x + at / count * shape_.x_image, firsts_[at % count], panels + at / count * image);
    });
  }

  void locate(const T* panels, i64 channel, i64 vector, int together, const T** from) const {
    const T* panel = panels + vector * kLanes<T> * shape_.in_channels + channel * together * kLanes<T>;
    for (int j = 0; j < together; j++) from[j] = panel + j * kLanes<T>;
  }
  const int32_t* offsets(int together) const { return offsets_[together - 1].data(); }

  const i64 image;  // elements from image to image
  const Pixels<T> pixels;

 private:
  void lay_out(const T* x, i64 first, T* panels) const {
    const Shape& s = shape_;
    const int together = vectors_together(pixels.vectors() - first);
    const i64 width = together * kLanes<T>;
    T* panel = panels + first * kLanes<T> * s.in_channels;
    if (pixels.dense() && s.x_column == 1 && s.stride_x == 1 && s.x_row == s.width && s.stride_y == 1) {
      for (i64 c = 0; c < s.in_channels; c++)
        for (int j = 0; j < together; j++)
          store(panel + c * width + j * kLanes<T>, load(x + c * s.x_channel + pixels.pixel(first + j, 0)));
      return;
    }
    i64 from[kTogether * kLanes<T>];
    for (i64 at = 0; at < width; at++) {
      const i64 pixel = max<i64>(0, pixels.pixel(first + at / kLanes<T>, at % kLanes<T>));
      from[at] = pixel / s.out_width * s.stride_y * s.x_row + pixel % s.out_width * s.stride_x * s.x_column;
    }
    // With channels last, a line of the cache has several channels of one pixel.
    const i64 block = s.x_channel == 1 ? 64 / static_cast<i64>(sizeof(T)) : 1;
    for (i64 c = 0; c < s.in_channels; c += block)
      for (i64 at = 0; at < width; at++)
        for (i64 b = c; b < min(c + block, s.in_channels); b++) panel[b * width + at] = x[b * s.x_channel + from[at]];
  }

  const Shape& shape_;
  std::vector<i64> firsts_;
  std::vector<int32_t> offsets_[kTogether];
};

}  // namespace dyconvert
