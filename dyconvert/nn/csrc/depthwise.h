// Convs of one input channel per group, and the gradients of their inputs. There is nothing to share between channels,
// so each is done by itself, its plane laid out in the innermost cache.
#pragma once
#include "mix.h"
#include "parts.h"
#include "planes.h"

namespace dyconvert {

template <typename T, typename B, bool gradient>
class Depthwise {
 public:
  explicit Depthwise(const Problem<T, B>& problem)
      : problem_(problem), shape_(problem.shape), seen_(gradient ? shape_of_gradient(shape_) : shape_), planes_(seen_) {
    if constexpr (gradient)
      parts_ = parts_of_gradient<T>(shape_, planes_, shape_.taps());
    else
      parts_ = parts_of_conv<T>(shape_, planes_);
  }

  void run() {
    const Shape& s = shape_;
    const i64 blocks = divided_up(s.in_channels, kChannels), each = s.group_out();
    const i64 grain = grain_of(kChannels * each * s.taps() * s.pixels());
    parallel(problem_.parallel_for, s.images * blocks, grain, [&](i64 begin, i64 end) {
      static thread_local Buffer<T> kernels, planes;
      const i64 together = gradient ? each : planes_.channels_together();
      T* kernel = kernels.of(kChannels * each * s.taps());
      T* plane = planes.of(planes_.plane * together + kLanes<T>);
      planes_.clear(plane, together);
      for (; begin < end; begin++) {
        const i64 image = begin / blocks, first = begin % blocks * kChannels;
        const i64 channels = min(kChannels, s.in_channels - first);
        mix(problem_, image, 1, first * each, channels * each, 0, s.taps(), s.taps(), kernel);
        for (i64 c = 0; c < channels; c++)
          if constexpr (gradient)
            gradient_of_channel(image, first + c, kernel + c * each * s.taps(), plane);
          else
            convolve_channel(image, first, c, channels, kernel + c * each * s.taps(), plane);
      }
    });
  }

 private:
  // Input channels whose kernels are mixed at once.
  static constexpr i64 kChannels = 16;

  // The output channels of the input channel first + c.
  void convolve_channel(i64 image, i64 first, i64 c, i64 channels, const T* kernels, T* planes) {
    const Shape& s = shape_;
    const i64 each = s.group_out(), together = planes_.channels_together();
    if (c % together == 0)
      planes_.lay_out(problem_.x + image * s.x_image + (first + c) * s.x_channel, min(together, channels - c), planes);
    for (i64 m = 0; m < each; m++) {
      const i64 channel = (first + c) * each + m;
      multiply_plane(parts_[0], planes + c % together * planes_.plane, kernels + m * s.taps(),
                     added(problem_, image, channel),
                     problem_.out + image * s.out_channels * s.pixels() + channel * s.out_channel);
    }
  }

  // kernels: of the output channels that the input channel has.
  void gradient_of_channel(i64 image, i64 channel, const T* kernels, T* planes) {
    const Shape& s = shape_;
    const i64 each = s.group_out();
    for (i64 m = 0; m < each; m++)
      planes_.lay_out(problem_.x + image * seen_.x_image + (channel * each + m) * seen_.x_channel, 1,
                      planes + m * planes_.plane);
    for (const Part<T>& part : parts_)
      multiply_plane(part, planes, kernels, T(0),
                     problem_.out + (image * s.in_channels + channel) * s.height * s.width + part.at);
  }

  void multiply_plane(const Part<T>& part, const T* planes, const T* kernel, T bias, T* out) {
    static constexpr MultiplyTile<T> kTiles[] = {multiply_tile<T, 1, 1>, multiply_tile<T, 1, 2>, multiply_tile<T, 1, 3>,
                                                 multiply_tile<T, 1, 4>, multiply_tile<T, 1, 5>, multiply_tile<T, 1, 6>,
                                                 multiply_tile<T, 1, 7>, multiply_tile<T, 1, 8>};
    constexpr i64 most = 8;
    alignas(64) T sums[(most + 1) * kLanes<T>];
    for (i64 left = part.pixels.vectors(), v = 0; left > 0;) {
      const i64 now = divided_up(left, divided_up(left, most));  // tiles of about one size
      const T* from[most];
      planes_.locate(planes, 0, part.pixels, v, now, from);
      kTiles[now - 1](kernel, 0, part.steps.data(), from, part.offsets(now), part.elements(), sums,
                      now * kLanes<T>, false);
      part.pixels.write(sums, 1, v, now, &bias, out);
      v += now;
      left -= now;
    }
  }

  const Problem<T, B>& problem_;
  const Shape& shape_;
  const Shape seen_;  // what is laid out, and convolved
  const Planes<T> planes_;
  std::vector<Part<T>> parts_;
};

}  // namespace dyconvert
