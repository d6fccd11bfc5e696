// A dynamic conv, and the gradient of its input, which is a conv of the output's gradient. A block of a kernel is
// mixed, and used while it is in cache: no image's kernel is ever written to memory, and the bank is read once.
#pragma once
#include "base/mix.h"
#include "direct/panel_column.h"
#include "direct/panels.h"
#include "base/phases.h"
#include "base/planes.h"

namespace DYCONVERT_TARGET {

// Elements of a row of a kernel at a time. With 256, the 24 KB of the input that they read stay in the innermost cache.
// AVX-512's microtiles are so large that loading their sums more rarely gains more: 384 is 2 to 8 % faster than 128 on
// Zen 5.
constexpr i64 kDepth = DYCONVERT_VECTOR == 64 ? 384 : 256;
// Channels of the result in a block: with more of them, the input is read fewer times; but the elements of their
// kernels should stay in a core's own cache.
constexpr i64 kRows = 64, kFewRows = 16, kWideRows = 512;
constexpr i64 kKernel = 40 * 1024;
// The most elements of a group's kernel that is one block.
constexpr i64 kWhole = 80 * 1024;
// Elements of kernels that are mixed at a time, for as many images as these make: they stay in the outer caches.
constexpr i64 kKernels = 512 * 1024;
// Vectors of pixels that are written at a time: output channels lie far apart, so going from one to the next is slow.
constexpr i64 kStrip = DYCONVERT_VECTOR == 32 ? 13 : 7;

// Layout: `Planes`, or `Panels` where many channels of the result read each element of the input. For the input's
// gradient, the problem's x is the output's gradient, and its out is the input's.
template <typename T, typename B, template <typename> class Layout, Task task>
class Conv {
 public:
  static constexpr bool gradient = task == Task::kInputGradient;

  explicit Conv(const Problem<T, B>& problem)
      : problem_(problem),
        shape_(problem.shape),
        conv_shape_(gradient ? gradient_as_conv(shape_) : shape_),
        layout_(layout()) {
    images_ = layout_.images();
    result_channels_ = gradient ? shape_.group_in() : shape_.group_out();
    channel_ = gradient ? shape_.height * shape_.width : shape_.out_channel;
    image_ = gradient ? shape_.in_channels * channel_ : shape_.out_channels * shape_.pixels();
    const i64 elements = conv_shape_.in_channels / shape_.groups * shape_.taps();
    const i64 most = kernel_fits()          ? result_channels_
                     : sums_output_blocks() ? wide_rows()
                                            : max(kFewRows, min(kRows, kKernel / elements));
    rows_ = rows_together(result_channels_, most, shape_.groups * images_, shape_.threads);
    // Rows are padded by one cache line: their lengths are often powers of two and would map to the same cache sets.
    ld_ = gradient ? rows_ * shape_.taps() : rounded_up(elements, 16) + 16;
    summed_outputs_ = sums_output_blocks() ? max<i64>(kFewRows, kKernel / rows_) : shape_.group_out();
    kernel_ = gradient ? summed_outputs_ * ld_ : rows_ * ld_;
    kernels_ = max<i64>(1, kKernels / kernel_);
    if constexpr (gradient)
      phases_ = phases_of_gradient<T>(shape_, layout_, ld_);
    else
      phases_ = phases_of_conv<T>(shape_, layout_);
  }

  i64 scratch_elements() const { return layout_.scratch_elements(images_); }

  void compute() {
    const i64 blocks = divided_up(result_channels_, rows_);
    for (i64 first = 0; first < shape_.images; first += images_) {
      const i64 count = min(images_, shape_.images - first);
      const T* x = layout_.lay_out_images(problem_.x + first * conv_shape_.x_image, count, problem_.scratch,
                                          problem_.parallel_for);
      const i64 grain = grain_of(rows_ * shape_.elements() * shape_.pixels());
      parallel(problem_.parallel_for, shape_.groups * blocks * count, grain, [&](i64 begin, i64 end) {
        while (begin < end) {
          const i64 block = begin / count, n = begin % count, images = min(count - n, end - begin);
          const i64 row = block % blocks * rows_;
          convolve(x + n * layout_.image, first + n, images, block / blocks, row, min(rows_, result_channels_ - row));
          begin += images;
        }
      });
    }
  }

 private:
  static constexpr bool kPanels = std::is_same_v<Layout<T>, Panels<T>>;

  // Whether one group's kernel fits in cache. If so, it is one block, and each panel is gathered once, just before it
  // is multiplied. Not with channels last, of which a cache line at a time is better gathered, nor with maps of fewer
  // pixels than a vector has lanes, of which many are better gathered at once.
  bool kernel_fits() const {
    return kPanels && shape_.group_out() * shape_.elements() <= kWhole && shape_.x_channel != 1 &&
           conv_shape_.pixels() >= kLanes<T>;
  }

  // Whether the input's gradient is computed from some output channels after the other, and summed where it is written.
  // Then longer runs of a row of the bank, which is an output channel's kernel, are read.
  bool sums_output_blocks() const {
    return kPanels && gradient && !kernel_fits() && shape_.stride_y * shape_.stride_x == 1 &&
           conv_shape_.pixels() >= kLanes<T>;
  }

  // Input channels in a block of such a gradient: all, so that rows of the bank are read from end to end; or, if they
  // are many, half of kWideRows, so that a microtile has enough output channels to sum over.
  i64 wide_rows() const { return result_channels_ <= kWideRows ? result_channels_ : kWideRows / 2; }

  Layout<T> layout() const {
    if constexpr (kPanels)
      return Layout<T>(conv_shape_, !kernel_fits(), !gradient && shape_.out_pixel == 1);
    else
      return Layout<T>(conv_shape_);
  }

  // Computes `rows` channels of the result, in one group, for some images.
  void convolve(const T* x, i64 image, i64 images, i64 group, i64 row, i64 rows) {
    const Shape& s = shape_;
    const i64 channel = group * result_channels_ + row;
    static thread_local Buffer<T> mixed, biases;
    T* kernels = mixed.of(min(kernels_, images) * kernel_);
    T* bias = biases.of(rows_);
    std::fill(bias, bias + rows, T(0));
    T* out = problem_.out + image * image_ + channel * channel_;
    for (i64 first = 0; first < s.group_out(); first += summed_outputs_) {
      const i64 outputs = min(summed_outputs_, s.group_out() - first);
      for (i64 n = 0; n < images; n++) {
        if (n % kernels_ == 0) {
          const i64 now = min(kernels_, images - n);
          if constexpr (gradient)
            mix(problem_, image + n, now, group * s.group_out() + first, outputs, row * s.taps(), rows * s.taps(), ld_,
                kernels);
          else
            mix(problem_, image + n, now, channel, rows, 0, s.elements(), ld_, kernels);
        }
        if constexpr (!gradient)
          for (i64 m = 0; m < rows; m++) bias[m] = mixed_bias(problem_, image + n, channel + m);
        const T* kernel = kernels + n % kernels_ * (gradient ? outputs : rows) * ld_;
        for (const Phase<T>& phase : phases_)
          if (!phase.elements())
            clear(phase, rows, out + n * image_ + phase.at);
          else if constexpr (kPanels)
            multiply_panels(phase, kernel, rows, x + n * layout_.image, group, first, outputs, bias,
                            out + n * image_ + phase.at);
          else
            multiply_planes(phase, kernel, rows, x + n * layout_.image, group, bias, out + n * image_ + phase.at);
      }
    }
  }

  // Writes zeros: pixels of the input that no tap reads have no gradient.
  void clear(const Phase<T>& phase, i64 rows, T* out) {
    static thread_local Buffer<T> buffer;
    const i64 vectors = phase.pixels.vectors(), elements = (vectors + 1) * kLanes<T>;
    T* zeros = buffer.of(elements);
    std::fill(zeros, zeros + elements, T(0));
    for (i64 m = 0; m < rows; m++) phase.pixels.write(zeros, 1, 0, vectors, zeros, out + m * channel_);
  }

  // Multiplies one image's kernel by its panels; for the input's gradient, only `outputs` output channels from `output`
  // on.
  void multiply_panels(const Phase<T>& phase, const T* kernel, i64 rows, const T* x, i64 group, i64 output, i64 outputs,
                       const T* bias, T* out) {
    const i64 first = gradient ? output : 0, elements = gradient ? outputs : phase.elements();
    static thread_local Buffer<T> panel, column, results, lasts, none;
    const Pixels<T>& pixels = phase.pixels;
    const bool direct = pixels.regular() && pixels.distance() == 1, last_channels = pixels.regular() && channel_ == 1;
    T* sums = results.of((rows * kTogether + 1) * kLanes<T>);
    T* zeros = none.of(rows);
    std::fill(zeros, zeros + rows, T(0));
    const T* last = layout_.column(x, group, column);
    T* last_sums = lasts.of(rows * kLanes<T>);
    if (last) std::fill(last_sums, last_sums + rows * kLanes<T>, T(0));
    for (i64 p = 0; p < layout_.count(); p++) {
      const i64 v = layout_.first(p), start = pixels.start(v);
      const int vectors = layout_.vectors(p);
      const T* from = layout_.panel(x, group, p, panel) + first * vectors * kLanes<T>;
      pixels.prefetch(rows, v, vectors, out);
      Results<T> to{sums, vectors * kLanes<T>, 0, last_channels ? bias : zeros};
      if (direct)
        to = {out + start, channel_, start + (vectors - 1) * kLanes<T> - pixels.start(v + vectors - 1),
              first ? nullptr : bias};
      for (i64 k = 0; k < elements; k += kDepth) {
        const i64 depth = min(kDepth, elements - k);
        multiply_panel(kernel, gradient ? shape_.taps() : ld_, rows, phase.steps.data() + k,
                       from + k * vectors * kLanes<T>, vectors, depth, to, [&](i64 row, i64 now) {
                         // The rows are still in the innermost cache.
                         if (last && p + 1 == layout_.count())
                           add_column(kernel + row * ld_ + k, ld_, now, last + k, depth, last_sums + row * kLanes<T>);
                       });
        to.bias = nullptr;
      }
      if (direct) continue;
      if (last_channels)
        for (int j = 0; j < vectors; j++)
          transpose(sums + j * kLanes<T>, vectors * kLanes<T>, rows, kLanes<T>,
                    out + pixels.start(v + j) * pixels.distance(), pixels.distance());
      else
        pixels.write(sums, rows, v, vectors, bias, out);
    }
    if (last)
      for (i64 m = 0; m < rows; m++)
        out[m * channel_ + shape_.pixels() - 1] = bias[m] + sum_of_lanes(last_sums + m * kLanes<T>);
  }

  // Multiplies one image's kernel by its planes.
  void multiply_planes(const Phase<T>& phase, const T* kernel, i64 rows, const T* x, i64 group, const T* bias, T* out) {
    alignas(64) T sums[(kRows * kStrip + 1) * kLanes<T>];
    const i64 vectors = phase.pixels.vectors(), channel = group * (conv_shape_.in_channels / conv_shape_.groups);
    for (i64 first = 0, strip; first < vectors; first += strip) {
      // The last strip has any number of vectors; all others have whole threes.
      strip = vectors - first <= kStrip ? vectors - first : kStrip - 1;
      phase.pixels.prefetch(rows, first, strip, out);
      for (i64 v = first; v < first + strip;) {
        const int together = vectors_together(vectors - v);
        const T* from[kTogether];
        layout_.locate(x, channel, phase.pixels, v, together, from);
        for (i64 k = 0; k < phase.elements(); k += kDepth)
          multiply(kernel, gradient ? shape_.taps() : ld_, rows, phase.steps.data() + k, from, together,
                   phase.offsets() + k, min(kDepth, phase.elements() - k), sums + (v - first) * kLanes<T>,
                   strip * kLanes<T>, k > 0);
        v += together;
      }
      phase.pixels.write(sums, rows, first, strip, bias, out);
    }
  }

  const Problem<T, B>& problem_;
  const Shape& shape_;
  const Shape conv_shape_;  // the conv that is computed
  const Layout<T> layout_;
  std::vector<Phase<T>> phases_;
  i64 result_channels_;          // channels of the result in a group
  i64 channel_, image_;          // strides of the result
  i64 images_, rows_, kernels_;  // at a time: images laid out, channels of the result, images' kernels
  i64 summed_outputs_;           // output channels that a gradient sums over at a time
  i64 ld_, kernel_;              // elements from row to row of a mixed kernel, and of a mixed kernel
};

}  // namespace DYCONVERT_TARGET
