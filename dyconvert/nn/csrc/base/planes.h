// Lays out the input: each channel as a plane, padded, and its phases one behind the other, so that a tap of the kernel
// reads the plane from some offset on.
#pragma once
#include "base/pixels.h"
#include "base/transpose.h"

namespace DYCONVERT_TARGET {

// Copies a few elements: a call to memcpy would take longer.
template <typename T>
inline void copy(T* to, const T* from, i64 count) {
  i64 at = 0;
  for (; at + kLanes<T> <= count; at += kLanes<T>) store(to + at, load(from + at));
  if (at < count && count >= kLanes<T>)
    store(to + count - kLanes<T>, load(from + count - kLanes<T>));
  else
    for (; at < count; at++) to[at] = from[at];
}

template <typename T>
inline void copy_every_other(T* to, const T* from, i64 count) {
  i64 at = 0;
  // The last two loads read up to one vector less one element beyond the source.
  for (; at + kLanes<T> < count; at += kLanes<T>)
    store(to + at, evens(load(from + 2 * at), load(from + 2 * at + kLanes<T>)));
  for (; at < count; at++) to[at] = from[2 * at];
}

// Elements that are laid out at a time: they stay in the outermost cache.
constexpr i64 kLaidOut = 1024 * 1024;

// Vectors of pixels of a conv of stride 1 that reads planes: row by row, or from end to end, with the gaps.
template <typename T>
inline i64 vectors_of_planes(const Shape& s) {
  const i64 pitch = s.out_width + (s.kernel_width - 1) * s.dilation_x;
  return min(s.out_height * divided_up(s.out_width, kLanes<T>),
             divided_up((s.out_height - 1) * pitch + s.out_width, kLanes<T>));
}

template <typename T>
class Planes {
 public:
  // spread: whether planes are not to lie a multiple of 256 bytes apart. If they do, the same pixel of many channels
  // has few of the cache's sets to lie in.
  explicit Planes(const Shape& s, bool spread = false)
      : shape_(s),
        phases_y_(s.kernel_height == 1 ? 1 : s.stride_y),
        phases_x_(s.kernel_width == 1 ? 1 : s.stride_x),
        pitch_(s.out_width + (s.kernel_width - 1) * s.dilation_x / s.stride_x),
        phase_elements_(pitch_ * (s.out_height + (s.kernel_height - 1) * s.dilation_y / s.stride_y)),
        plane(phases_y_ * phases_x_ * phase_elements_ +
              (spread && phases_y_ * phases_x_ * phase_elements_ * sizeof(T) % 256 < 64 ? 64 / sizeof(T) : 0)),
        image(s.in_channels * plane) {}

  // Elements of the planes of `images` images, and of the vector that is read beyond them.
  i64 scratch_elements(i64 images) const { return images * image + kLanes<T>; }

  // Images that are laid out at a time.
  i64 images() const { return max<i64>(1, min(shape_.images, kLaidOut / image)); }

  // Lays out the planes of `images` images, and returns them.
  const T* lay_out_images(const T* x, i64 images, T* planes, ParallelFor parallel_for) const {
    const Shape& s = shape_;
    const i64 together = channels_together(), blocks = divided_up(s.in_channels, together);
    parallel(parallel_for, images * blocks, max<i64>(1, 8192 / (plane * together)), [&](i64 begin, i64 end) {
      for (i64 at = begin; at < end; at++) {
        const i64 n = at / blocks, channel = at % blocks * together, channels = min(together, s.in_channels - channel);
        T* to = planes + n * image + channel * plane;
        clear(to, channels);
        lay_out(x + n * s.x_image + channel * s.x_channel, channels, to);
      }
    });
    return planes;
  }

  // Sets `from` to where `together` vectors of pixels are, from `vector` on, in the plane of `channel`.
  void locate(const T* planes, i64 channel, const Pixels<T>& pixels, i64 vector, int together, const T** from) const {
    for (int j = 0; j < together; j++) from[j] = planes + channel * plane + pixels.start(vector + j);
  }

  // From a pixel in the first channel's plane to the element of `channel` that a tap at (y, x) of the padded input
  // reads.
  static constexpr bool kOffsets = true;
  i64 offset(i64 channel, i64 y, i64 x) const {
    const i64 phase = y % shape_.stride_y * phases_x_ + x % shape_.stride_x;
    return channel * plane + phase * phase_elements_ + y / shape_.stride_y * pitch_ + x / shape_.stride_x;
  }

  // The same for a tap of the kernel, in the first channel.
  i64 offset_of_tap(i64 tap) const {
    const Shape& s = shape_;
    return offset(0, tap / s.kernel_width * s.dilation_y, tap % s.kernel_width * s.dilation_x);
  }

  i64 pitch() const { return pitch_; }

  // Channels that are laid out at a time. With channels last, a cache line has several channels of one pixel.
  i64 channels_together() const {
    return shape_.x_channel == 1 && shape_.in_channels > 1 ? 64 / static_cast<i64>(sizeof(T)) : 1;
  }

  // Whether the input already lies as planes.
  bool in_place() const {
    const Shape& s = shape_;
    return s.taps() == 1 && !s.padding_y && !s.padding_x && s.stride_y == 1 && s.stride_x == 1 && s.x_column == 1 &&
           s.x_row == s.width && s.x_channel == plane;
  }

  // Sets planes to zero, for their padding: no image writes to it, so it stays zero.
  void clear(T* to, i64 channels) const {
    const Shape& s = shape_;
    const bool covered = s.taps() == 1 && !s.padding_y && !s.padding_x &&
                         s.height > (s.out_height - 1) * s.stride_y && s.width > (s.out_width - 1) * s.stride_x;
    if (!covered) std::fill(to, to + channels * plane, T(0));
  }

  // Copies `channels` channels from `x` on to their planes, whose padding is zero already.
  void lay_out(const T* x, i64 channels, T* to) const {
    const Shape& s = shape_;
    for (i64 phase_y = 0; phase_y < phases_y_; phase_y++) {
      const i64 above = divided_up(s.padding_y - phase_y, s.stride_y);
      const i64 below = divided_up(s.height + s.padding_y - phase_y, s.stride_y);
      const i64 last = min(below, phase_elements_ / pitch_);
      for (i64 r = max<i64>(0, above); r < last; r++) {
        const T* from = x + (r * s.stride_y + phase_y - s.padding_y) * s.x_row;
        T* row = to + phase_y * phases_x_ * phase_elements_ + r * pitch_;
        for (i64 phase_x = 0; phase_x < phases_x_; phase_x++, row += phase_elements_) {
          // [begin, end): the columns that the input has. Those before and after are padding.
          const i64 begin = min(max<i64>(0, divided_up(s.padding_x - phase_x, s.stride_x)), pitch_);
          const i64 end = min(pitch_, divided_up(s.width + s.padding_x - phase_x, s.stride_x));
          const T* first = from + (begin * s.stride_x + phase_x - s.padding_x) * s.x_column;
          const i64 step = s.stride_x * s.x_column;
          if (channels > 1)
            transpose(first, step, max<i64>(0, end - begin), channels, row + begin, plane);
          else if (step == 1)
            copy(row + begin, first, end - begin);
          else if (step == 2)
            copy_every_other(row + begin, first, end - begin);
          else
            for (i64 at = begin; at < end; at++, first += step) row[at] = *first;
        }
      }
    }
  }

 private:
  const Shape shape_;
  i64 phases_y_, phases_x_, pitch_, phase_elements_;

 public:
  const i64 plane, image;  // elements of a channel's plane, and of an image's planes
};

}  // namespace DYCONVERT_TARGET
