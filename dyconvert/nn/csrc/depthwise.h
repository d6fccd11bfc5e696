// Convs of one input channel per group, and the gradients of their inputs. There is nothing to share between channels,
// so each is done by itself, its plane laid out in the innermost cache.
#pragma once
#include "columns.h"
#include "mix_taps.h"

namespace dyconvert {

template <typename T, typename B, bool gradient>
class Depthwise {
 public:
  explicit Depthwise(const Problem<T, B>& problem)
      : problem_(problem),
        shape_(problem.shape),
        seen_(gradient ? shape_of_gradient(shape_) : shape_),
        planes_(seen_),
        rows_(seen_, planes_),
        seen_each_(gradient ? shape_.group_out() : 1),
        together_(max(planes_.channels_together(), min(kChannels, kPlanes / (seen_each_ * planes_.plane)))) {
    if constexpr (gradient)
      fields_ = fields_of_gradient<T>(shape_, planes_);
    else
      fields_ = {field_of_conv<T>(shape_, planes_)};
  }

  void run() {
    const Shape& s = shape_;
    const i64 blocks = divided_up(s.in_channels, together_), kernel = s.group_out() * s.taps();
    const i64 grain = grain_of(together_ * kernel * s.pixels());
    // A block's images one after the other, so that its part of the bank stays in cache.
    parallel(problem_.parallel_for, s.images * blocks, grain, [&](i64 begin, i64 end) {
      static thread_local Buffer<T> mixed, laid_out;
      T* kernels = mixed.of(together_ * kernel);
      T* planes = laid_out.of(together_ * seen_each_ * planes_.plane + kLanes<T>);
      planes_.clear(planes, together_ * seen_each_);
      for (; begin < end; begin++) {
        const i64 image = begin % s.images, first = begin / s.images * together_;
        const i64 channels = min(together_, s.in_channels - first);
        mix_taps(problem_, image, first * s.group_out(), channels * s.group_out(), kernels);
        rows_.lay_out(problem_.x + image * seen_.x_image + first * seen_each_ * seen_.x_channel, channels * seen_each_,
                      planes);
        for (i64 c = 0; c < channels; c++)
          convolve(image, first + c, kernels + c * kernel, planes + c * seen_each_ * planes_.plane);
      }
    });
  }

 private:
  // The most input channels at a time, and elements of their planes: what stays in the innermost cache.
  static constexpr i64 kChannels = 16, kPlanes = 4096;

  // An input channel: its output channels, or its gradient.
  void convolve(i64 image, i64 channel, const T* kernels, const T* planes) const {
    const Shape& s = shape_;
    const i64 each = s.group_out();
    if constexpr (gradient) {
      T* out = problem_.out + (image * s.in_channels + channel) * s.height * s.width;
      for (const Field& field : fields_) convolve_plane(field, kernels, planes, planes_.pitch(), T(0), out);
    } else {
      for (i64 c = channel * each; c < (channel + 1) * each; c++, kernels += s.taps())
        convolve_plane(fields_[0], kernels, planes, planes_.pitch(), added(problem_, image, c),
                       problem_.out + image * s.out_channels * s.pixels() + c * s.out_channel);
    }
  }

  const Problem<T, B>& problem_;
  const Shape& shape_;
  const Shape seen_;  // what is laid out, and convolved
  const Planes<T> planes_;
  const Rows<T> rows_;
  const i64 seen_each_;  // channels that are laid out for an input channel
  const i64 together_;   // input channels that are laid out at once
  std::vector<Field> fields_;
};

}  // namespace dyconvert
