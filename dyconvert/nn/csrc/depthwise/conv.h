// Convs of one input channel per group, and the gradients of their inputs. Channels share nothing, so each is computed
// by itself; a block has as many channels as fit into the innermost cache.
#pragma once
#include "depthwise/columns.h"
#include "depthwise/mix.h"

namespace DYCONVERT_TARGET {

template <typename T, typename B, Task task>
class Depthwise {
 public:
  static constexpr bool gradient = task == Task::kInputGradient;

  explicit Depthwise(const Problem<T, B>& problem)
      : problem_(problem),
        shape_(problem.shape),
        channels_read_(gradient ? shape_.group_out() : 1),
        input_(gradient ? gradient_as_conv(shape_) : shape_, problem.x, channels_read_, whole_columns(shape_)) {
    if constexpr (gradient)
      fields_ = fields_of_gradient<T>(shape_, input_);
    else
      fields_ = fields_of_conv<T>(shape_, input_);
  }

  void compute() {
    const Shape& s = shape_;
    const i64 together = input_.together / channels_read_, blocks = divided_up(s.in_channels, together);
    const i64 kernel = s.group_out() * s.taps();
    const i64 grain = grain_of(together * kernel * s.pixels());
    // All images of a block of channels, one after the other: so the block's weights stay in cache.
    parallel(problem_.parallel_for, s.images * blocks, grain, [&](i64 begin, i64 end) {
      static thread_local Buffer<T> mixed, planes, biases;
      T* kernels = mixed.of(together * kernel);
      T* scratch = planes.of(input_.scratch_elements());
      T* bias = biases.of(together);
      std::fill(bias, bias + together, T(0));
      input_.clear(scratch);
      for (; begin < end; begin++) {
        const i64 image = begin % s.images, first = begin / s.images * together;
        const i64 channels = min(together, s.in_channels - first);
        mix_taps(problem_, image, first * s.group_out(), channels * s.group_out(), kernels);
        const T* plane = input_.read(image, first * channels_read_, channels * channels_read_, scratch);
        if constexpr (gradient) {
          const i64 size = s.height * s.width;
          T* out = problem_.out + (image * s.in_channels + first) * size;
          for (const Field& field : fields_)
            convolve<T>(input_, field,
                        {channels, plane, channels_read_ * input_.plane, kernels, kernel, bias, out, size});
        } else {
          // The first output channel of every group of the block, then the second of every group.
          for (i64 m = 0; m < s.group_out(); m++) {
            const i64 apart = s.group_out(), channel = first * apart + m;
            for (i64 c = 0; c < channels; c++) bias[c] = mixed_bias(problem_, image, channel + c * apart);
            T* out = problem_.out + image * s.out_channels * s.pixels() + channel * s.out_channel;
            for (const Field& field : fields_)
              convolve<T>(input_, field, {channels, plane, input_.plane, kernels + m * s.taps(), kernel, bias, out,
                                          apart * s.out_channel});
          }
        }
      }
    });
  }

 private:
  const Problem<T, B>& problem_;
  const Shape& shape_;
  const i64 channels_read_;  // channels of x that one channel of the result reads
  const Input<T> input_;
  std::vector<Field> fields_;
};

}  // namespace DYCONVERT_TARGET
