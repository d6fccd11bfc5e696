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
        each_(gradient ? shape_.group_out() : 1),
        input_(gradient ? shape_of_gradient(shape_) : shape_, problem.x, each_) {
    if constexpr (gradient)
      fields_ = fields_of_gradient<T>(shape_, input_);
    else
      fields_ = {field_of_conv<T>(shape_, input_)};
  }

  void run() {
    const Shape& s = shape_;
    const i64 together = input_.together / each_, blocks = divided_up(s.in_channels, together);
    const i64 kernel = s.group_out() * s.taps();
    // A block's images one after the other, so that its part of the bank stays in cache.
    parallel(problem_.parallel_for, s.images * blocks, grain_of(together * kernel * s.pixels()), [&](i64 begin, i64 end) {
      static thread_local Buffer<T> mixed, planes;
      T* kernels = mixed.of(together * kernel);
      T* scratch = planes.of(input_.scratch_elements());
      input_.clear(scratch);
      for (; begin < end; begin++) {
        const i64 image = begin % s.images, first = begin / s.images * together;
        const i64 channels = min(together, s.in_channels - first);
        mix_taps(problem_, image, first * s.group_out(), channels * s.group_out(), kernels);
        const T* plane = input_.read(image, first * each_, channels * each_, scratch);
        for (i64 c = 0; c < channels; c++)
          convolve(image, first + c, plane + c * each_ * input_.plane, kernels + c * kernel);
      }
    });
  }

 private:
  // An input channel: its output channels, or its gradient.
  void convolve(i64 image, i64 channel, const T* planes, const T* kernels) const {
    const Shape& s = shape_;
    const i64 each = s.group_out();
    if constexpr (gradient) {
      T* out = problem_.out + (image * s.in_channels + channel) * s.height * s.width;
      for (const Field& field : fields_) convolve_plane(input_, field, planes, kernels, T(0), out);
    } else {
      for (i64 c = channel * each; c < (channel + 1) * each; c++, kernels += s.taps())
        convolve_plane(input_, fields_[0], planes, kernels, added(problem_, image, c),
                       problem_.out + image * s.out_channels * s.pixels() + c * s.out_channel);
    }
  }

  const Problem<T, B>& problem_;
  const Shape& shape_;
  const i64 each_;  // channels that are read for an input channel
  const Input<T> input_;
  std::vector<Field> fields_;
};

}  // namespace dyconvert
