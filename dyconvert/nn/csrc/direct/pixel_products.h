// The gradient of one image's kernel, tap by tap: the output's gradient times the pixels that a tap reads.
#pragma once
#include "base/multiply.h"
#include "base/planes.h"
#include "base/transpose.h"

namespace DYCONVERT_TARGET {

template <typename T>
class PixelProducts {
 public:
  // width: channels of a channel panel.
  PixelProducts(const Shape& s, i64 width) : shape_(s), planes_(s), width_(width) {
    for (i64 y = 0; y < s.out_height; y++)
      for (i64 x = 0; x < s.out_width; x++) {
        steps_.push_back(steps_.size());
        offsets_.push_back((y * planes_.pitch() + x) * width);
      }
  }

  // Elements of a channel panel: [plane, width].
  i64 panel() const { return planes_.plane * width_; }

  // The output's gradient is read in place.
  i64 grad_elements() const { return 0; }
  void lay_out_grad(const T*, i64, T*, ParallelFor) const {}

  // Lays out up to one vector of channels at `to` in a channel panel.
  void lay_out(const T* x, i64 channels, T* to) const {
    if (planes_.in_place()) return transpose(x, planes_.plane, channels, planes_.plane, to, width_);
    static thread_local Buffer<T> buffer;
    T* planes = buffer.of(kLanes<T> * planes_.plane);
    planes_.clear(planes, channels);
    for (i64 c = 0; c < channels; c++) planes_.lay_out(x + c * shape_.x_channel, 1, planes + c * planes_.plane);
    transpose(planes, planes_.plane, channels, planes_.plane, to, width_);
  }

  // to[taps, rows, lanes]: the gradients of `rows` output channels from `channel` on, and of the channels in x.
  // grad: of an image's output.
  void multiply_image(const T* grad, const T*, i64 channel, i64 rows, const T* x, i64 lanes, T* to) const {
    const i64 pixels = shape_.pixels();
    const int together = width_ / kLanes<T>;
    grad += channel * pixels;
    for (i64 pixel = 0; pixel < pixels; pixel += kPixels)
      for (i64 lane = 0; lane < lanes; lane += width_)
        for (i64 tap = 0; tap < shape_.taps(); tap++) {
          const T* from[kTogether];
          for (int j = 0; j < together; j++)
            from[j] = x + lane * planes_.plane + planes_.offset_of_tap(tap) * width_ + j * kLanes<T>;
          multiply(grad, pixels, rows, steps_.data() + pixel, from, together, offsets_.data() + pixel,
                   min(kPixels, pixels - pixel), to + tap * rows * lanes + lane, lanes, pixel > 0);
        }
  }

 private:
  // Pixels at a time: the input that they read stays in the innermost cache.
  static constexpr i64 kPixels = 256;

  const Shape shape_;
  const Planes<T> planes_;
  const i64 width_;
  std::vector<int32_t> steps_, offsets_;  // of the output's pixels: in its gradient, and in a channel panel
};

}  // namespace DYCONVERT_TARGET
