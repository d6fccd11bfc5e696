// How the input of a 1 x 1 conv lies while it is convolved: a few vectors of pixels, channel by channel. In the input
// itself channels lie far apart, and their pixels would share the cache's few places.
#pragma once
#include "multiply.h"
#include "planes.h"

namespace dyconvert {

template <typename T>
class Panels {
 public:
  explicit Panels(const Shape& s)
      : shape_(s),
        planes_(s),
        pixels_({s.out_height, s.out_width, s.pixels(), s.out_width, 1}, s.out_width),
        image(s.in_channels * pixels_.vectors() * kLanes<T>),
        in_place_(planes_.in_place() && s.pixels() >= kLanes<T>) {}

  i64 scratch_elements(i64 images) const { return images * image; }

  void lay_out_images(const T* x, i64 images, T* panels, ParallelFor parallel_for) const {
    const Shape& s = shape_;
    const i64 blocks = divided_up(s.in_channels, kChannels);
    const i64 grain = max<i64>(1, 8192 / (kChannels * s.pixels()));
    parallel(parallel_for, images * blocks, grain, [&](i64 begin, i64 end) {
      static thread_local Buffer<T> buffer;
      for (; begin < end; begin++) {
        const i64 n = begin / blocks, first = begin % blocks * kChannels, channels = min(kChannels, s.in_channels - first);
        const T* from = x + n * s.x_image + first * s.x_channel;
        if (in_place_) {
          gather(from, s.x_channel, first, channels, panels + n * image);
          continue;
        }
        T* planes = buffer.of(kChannels * planes_.plane + kLanes<T>);
        const i64 together = planes_.channels_together();
        for (i64 c = 0; c < channels; c += together)
          planes_.lay_out(from + c * s.x_channel, min(together, channels - c), planes + c * planes_.plane);
        gather(planes, planes_.plane, first, channels, panels + n * image);
      }
    });
  }

  void locate(const T* panels, i64 channel, const Pixels<T>&, i64 vector, int together, const T** from) const {
    const T* panel = panels + vector * kLanes<T> * shape_.in_channels + channel * together * kLanes<T>;
    for (int j = 0; j < together; j++) from[j] = panel + j * kLanes<T>;
  }

  // Panels of fewer vectors have their channels closer together.
  static constexpr int kOffsets = kTogether;
  i64 offset(i64 channel, i64, i64, int together) const { return channel * together * kLanes<T>; }

  i64 pitch() const { return shape_.out_width; }

 private:
  // Channels that are gathered at once.
  static constexpr i64 kChannels = 16;

  void gather(const T* planes, i64 plane, i64 first, i64 channels, T* panels) const {
    for (i64 v = 0; v < pixels_.vectors();) {
      const int together = together_from(v, pixels_.vectors());
      T* panel = panels + v * kLanes<T> * shape_.in_channels + first * together * kLanes<T>;
      for (i64 c = 0; c < channels; c++)
        for (int j = 0; j < together; j++, panel += kLanes<T>)
          store(panel, load(planes + c * plane + pixels_.start(v + j)));
      v += together;
    }
  }

  const Shape shape_;
  const Planes<T> planes_;
  const Pixels<T> pixels_;

 public:
  const i64 image;  // elements from image to image

 private:
  const bool in_place_;
};

}  // namespace dyconvert
