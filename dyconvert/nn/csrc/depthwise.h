// Convs of one input channel per group. There is nothing to share between output channels, so each is done by itself,
// its plane laid out in the innermost cache.
#pragma once
#include "mix.h"
#include "multiply.h"
#include "planes.h"

namespace dyconvert {

template <typename T, typename B>
class Depthwise {
 public:
  explicit Depthwise(const Problem<T, B>& problem)
      : problem_(problem), shape_(problem.shape), planes_(shape_) {}

  void run() {
    const i64 blocks = divided_up(shape_.in_channels, kChannels);
    const i64 grain = grain_of(kChannels * shape_.group_out() * shape_.taps() * shape_.pixels());
    parallel(problem_.parallel_for, shape_.images * blocks, grain, [&](i64 begin, i64 end) {
      static thread_local Buffer<T> kernels, planes;
      const i64 together = planes_.channels_together();
      T* kernel = kernels.of(kChannels * shape_.group_out() * shape_.taps());
      T* plane = planes.of(planes_.plane * together + kLanes<T>);
      planes_.clear(plane, together);
      for (; begin < end; begin++) {
        const i64 first = begin % blocks * kChannels;
        convolve(begin / blocks, first, min(kChannels, shape_.in_channels - first), kernel, plane);
      }
    });
  }

 private:
  // Input channels whose kernels are mixed at once.
  static constexpr i64 kChannels = 16;

  // `channels` input channels of an image, from `first` on.
  void convolve(i64 image, i64 first, i64 channels, T* kernels, T* planes) {
    const Shape& s = shape_;
    const i64 each = s.group_out(), together = planes_.channels_together();
    mix(problem_, image, 1, first * each, channels * each, s.taps(), kernels);
    for (i64 c = 0; c < channels; c++) {
      if (c % together == 0)
        planes_.lay_out(problem_.x + image * s.x_image + (first + c) * s.x_channel, min(together, channels - c), planes);
      for (i64 m = 0; m < each; m++) {
        const i64 channel = (first + c) * each + m;
        T* out = problem_.out + image * s.out_channels * s.pixels() + channel * s.out_channel;
        one_channel(planes + c % together * planes_.plane, kernels + (c * each + m) * s.taps(),
                    added(problem_, image, channel), out);
      }
    }
  }

  void one_channel(const T* plane, const T* kernel, T bias, T* out) {
    static constexpr MultiplyTile<T> kTiles[] = {multiply_tile<T, 1, 1>, multiply_tile<T, 1, 2>, multiply_tile<T, 1, 3>,
                                                 multiply_tile<T, 1, 4>, multiply_tile<T, 1, 5>, multiply_tile<T, 1, 6>,
                                                 multiply_tile<T, 1, 7>, multiply_tile<T, 1, 8>};
    constexpr i64 most = 8;
    const Pixels<T>& pixels = planes_.pixels;
    alignas(64) T sums[(most + 1) * kLanes<T>];
    for (i64 left = pixels.vectors(), v = 0; left > 0;) {
      const i64 now = divided_up(left, divided_up(left, most));  // tiles of about one size
      const T* from[most];
      planes_.locate(plane, 0, v, now, from);
      kTiles[now - 1](kernel, 0, from, planes_.offsets(now), shape_.taps(), sums, now * kLanes<T>, false);
      pixels.write(sums, 1, v, now, &bias, out);
      v += now;
      left -= now;
    }
  }

  const Problem<T, B>& problem_;
  const Shape& shape_;
  const Planes<T> planes_;
};

}  // namespace dyconvert
