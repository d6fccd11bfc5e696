// Reads the input's planes for convs of one input channel per group. If the stride is one, a plane is read in place,
// and lanes beside its rows are masked out; else it is laid out first.
#pragma once
#include "depthwise/rows.h"

namespace DYCONVERT_TARGET {

// Where the first element that a tap reads is: its offset in a plane, and its row and column of the input.
struct Place {
  i64 offset, down, right;
};

template <typename T>
class Input {
 public:
  // x: [N, C_in, H, W], with the shape's strides. read_together: channels that are read together. in_place: whether
  // planes may be read in place, if they can.
  Input(const Shape& s, const T* x, i64 read_together, bool in_place)
      : shape_(s),
        planes_(s),
        in_place_(in_place && !is_flat(s) && s.stride_y == 1 && s.stride_x == 1 && s.x_column == 1 &&
                  s.x_row == s.width && s.x_channel == s.height * s.width),
        rows_(in_place_ ? Rows<T>() : Rows<T>(s, planes_)),
        x_(x),
        end_(x + (s.images - 1) * s.x_image + s.in_channels * s.x_channel),
        flat(is_flat(s)),
        plane(in_place_ ? s.x_channel : planes_.plane),
        pitch(in_place_ ? s.width : flat ? kLanes<T> : planes_.pitch()),
        height(in_place_ ? s.height : plane),
        together(read_together * max(divided_up(planes_.channels_together(), read_together),
                                     min(kChannels, kElements / (read_together * plane)))) {
    const i64 read = max(s.out_width, kLanes<T>);
    if (in_place_) {
      before_ = max<i64>(0, s.padding_x);
      after_ = max<i64>(0, read + (s.kernel_width - 1) * s.dilation_x - s.padding_x - s.width);
      mask_.assign(before_ + s.width + after_, T(0));
      memset(static_cast<void*>(mask_.data() + before_), 0xff, s.width * sizeof(T));
    } else {
      after_ = kLanes<T>;
      mask_.assign(read, T(0));
      memset(static_cast<void*>(mask_.data()), 0xff, read * sizeof(T));
    }
  }

  // Where a tap reads `channel` if the tap is at (y, x) of the padded input.
  Place place(i64 channel, i64 y, i64 x) const {
    if (!in_place_) return {planes_.offset(channel, y, x), 0, 0};
    const i64 down = y - shape_.padding_y, right = x - shape_.padding_x;
    return {channel * plane + down * pitch + right, down, right};
  }

  // One mask a column, from the input's first column on: all bits set where the input has that column, else none.
  const T* mask() const { return mask_.data() + before_; }

  i64 scratch_elements() const { return before_ + together * plane + after_; }
  void clear(T* scratch) const {
    if (!in_place_) planes_.clear(scratch, together);
  }

  // The planes of some channels of an image.
  const T* read(i64 image, i64 channel, i64 channels, T* scratch) const {
    const T* from = x_ + image * shape_.x_image + channel * shape_.x_channel;
    if (!in_place_) {
      rows_.lay_out(from, channels, scratch);
      return scratch;
    }
    const i64 elements = channels * plane;
    if (from - x_ >= before_ && end_ - (from + elements) >= after_) return from;
    // Vectors would read beyond the input's memory.
    std::copy(from, from + elements, scratch + before_);
    return scratch + before_;
  }

 private:
  // At most so many channels at a time, and elements of their planes, which stay in the innermost cache.
  static constexpr i64 kChannels = 16, kElements = 4096;

  static bool is_flat(const Shape& s) {
    return s.kernel_height == 1 && s.out_height == 1 && s.out_width >= kLanes<T>;
  }

  const Shape shape_;
  const Planes<T> planes_;
  const bool in_place_;
  const Rows<T> rows_;
  const T* x_;
  const T* end_;
  std::vector<T> mask_;
  i64 before_ = 0, after_;  // elements that are read around planes

 public:
  const bool flat;         // the input is a single row, which is read as rows of a vector's width
  const i64 plane, pitch;  // elements from one plane to the next, and from row to row
  const i64 height;        // rows that are read
  const i64 together;      // channels at a time, a multiple of read_together
};

}  // namespace DYCONVERT_TARGET
