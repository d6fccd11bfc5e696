// A dynamic conv, and the gradient of its input, which is a conv of the output's gradient. Parts of a kernel are mixed
// and used while they are in cache, so that no image's kernel is ever written to memory and the bank is read once.
#pragma once
#include "base/mix.h"
#include "direct/panel_column.h"
#include "direct/panels.h"
#include "base/parts.h"
#include "base/planes.h"

namespace DYCONVERT_TARGET {

// Elements of a row of a kernel at a time. With 256, what they read of the input, 24 KB, stays in the innermost cache; a
// tile of AVX-512 is so large that loading its sums more seldom gains more: 384 are 2 to 8 % faster than 128 on Zen 5.
constexpr i64 kDepth = DYCONVERT_VECTOR == 64 ? 384 : 256;
// Channels of the result at a time: the more, the fewer times what they are made of is read; but the elements of their
// kernels should stay in a core's own cache.
constexpr i64 kRows = 64, kFewRows = 16, kWideRows = 512;
constexpr i64 kKernel = 40 * 1024;
// Elements of a kernel that is taken as a whole.
constexpr i64 kWhole = 80 * 1024;
// Elements of kernels that are mixed at a time, for as many images as that is: what stays in the outer caches.
constexpr i64 kKernels = 512 * 1024;
// Vectors of pixels that are written at a time: output channels lie far apart, and going from one to the next is dear.
constexpr i64 kStrip = DYCONVERT_VECTOR == 32 ? 13 : 7;

// Layout: `Planes`, or `Panels` where each element of the input meets many channels of the result. gradient: of the
// input, of which the problem's x is the output's gradient, and its out the result.
template <typename T, typename B, template <typename> class Layout, Result result>
class Conv {
 public:
  static constexpr bool gradient = result == Result::kInputGradient;

  explicit Conv(const Problem<T, B>& problem)
      : problem_(problem),
        shape_(problem.shape),
        seen_(gradient ? shape_of_gradient(shape_) : shape_),
        layout_(layout()) {
    images_ = layout_.images();
    group_ = gradient ? shape_.group_in() : shape_.group_out();
    channel_ = gradient ? shape_.height * shape_.width : shape_.out_channel;
    image_ = gradient ? shape_.in_channels * channel_ : shape_.out_channels * shape_.pixels();
    const i64 elements = seen_.in_channels / shape_.groups * shape_.taps();
    const i64 most = whole() ? group_ : sliced() ? wide() : max(kFewRows, min(kRows, kKernel / elements));
    rows_ = rows_together(group_, most, shape_.groups * images_, shape_.threads);
    // Rows a line of the cache further apart than they are long, or their lengths, often powers of two, would have
    // them share the cache's few places.
    ld_ = gradient ? rows_ * shape_.taps() : rounded_up(elements, 16) + 16;
    slice_ = sliced() ? max<i64>(kFewRows, kKernel / rows_) : shape_.group_out();
    kernel_ = gradient ? slice_ * ld_ : rows_ * ld_;
    kernels_ = max<i64>(1, kKernels / kernel_);
    if constexpr (gradient)
      parts_ = parts_of_gradient<T>(shape_, layout_, ld_);
    else
      parts_ = parts_of_conv<T>(shape_, layout_);
  }

  i64 scratch_elements() const { return layout_.scratch_elements(images_); }

  void run() {
    const i64 blocks = divided_up(group_, rows_);
    for (i64 first = 0; first < shape_.images; first += images_) {
      const i64 count = min(images_, shape_.images - first);
      const T* x = layout_.lay_out_images(problem_.x + first * seen_.x_image, count, problem_.scratch,
                                          problem_.parallel_for);
      const i64 grain = grain_of(rows_ * shape_.elements() * shape_.pixels());
      parallel(problem_.parallel_for, shape_.groups * blocks * count, grain, [&](i64 begin, i64 end) {
        while (begin < end) {
          const i64 block = begin / count, n = begin % count, images = min(count - n, end - begin);
          const i64 row = block % blocks * rows_;
          convolve(x + n * layout_.image, first + n, images, block / blocks, row, min(rows_, group_ - row));
          begin += images;
        }
      });
    }
  }

 private:
  static constexpr bool kPanels = std::is_same_v<Layout<T>, Panels<T>>;

  // Whether a group's kernel is taken as a whole: what it meets is then brought together where it is used, and once.
  // Channels last are better brought together a line of the cache at a time, and maps of a few pixels many at once.
  bool whole() const {
    return kPanels && shape_.group_out() * shape_.elements() <= kWhole && shape_.x_channel != 1 &&
           seen_.pixels() >= kLanes<T>;
  }

  // Whether the gradient is made of some output channels after the other, added up where it is written. A row of the
  // bank, which is an output channel's, is then read in longer runs.
  bool sliced() const {
    return kPanels && gradient && !whole() && shape_.stride_y * shape_.stride_x == 1 && seen_.pixels() >= kLanes<T>;
  }

  // Channels of such a gradient at a time: all, for rows of the bank that lie one behind the other, or as many as leave
  // a tile enough output channels to add up.
  i64 wide() const { return group_ <= kWideRows ? group_ : kWideRows / 2; }

  Layout<T> layout() const {
    if constexpr (kPanels)
      return Layout<T>(seen_, !whole(), !gradient && shape_.out_pixel == 1);
    else
      return Layout<T>(seen_);
  }

  // `rows` channels of the result, in a group, of some images.
  void convolve(const T* x, i64 image, i64 images, i64 group, i64 row, i64 rows) {
    const Shape& s = shape_;
    const i64 channel = group * group_ + row;
    static thread_local Buffer<T> mixed, biases;
    T* kernels = mixed.of(min(kernels_, images) * kernel_);
    T* bias = biases.of(rows_);
    std::fill(bias, bias + rows, T(0));
    T* out = problem_.out + image * image_ + channel * channel_;
    for (i64 first = 0; first < s.group_out(); first += slice_) {
      const i64 outputs = min(slice_, s.group_out() - first);
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
          for (i64 m = 0; m < rows; m++) bias[m] = added(problem_, image + n, channel + m);
        const T* kernel = kernels + n % kernels_ * (gradient ? outputs : rows) * ld_;
        for (const Part<T>& part : parts_)
          if (!part.elements())
            clear(part, rows, out + n * image_ + part.at);
          else if constexpr (kPanels)
            multiply_panels(part, kernel, rows, x + n * layout_.image, group, first, outputs, bias,
                            out + n * image_ + part.at);
          else
            multiply_planes(part, kernel, rows, x + n * layout_.image, group, bias, out + n * image_ + part.at);
      }
    }
  }

  // Pixels of the input that no weight meets have no gradient.
  void clear(const Part<T>& part, i64 rows, T* out) {
    static thread_local Buffer<T> buffer;
    const i64 vectors = part.pixels.vectors(), elements = (vectors + 1) * kLanes<T>;
    T* zeros = buffer.of(elements);
    std::fill(zeros, zeros + elements, T(0));
    for (i64 m = 0; m < rows; m++) part.pixels.write(zeros, 1, 0, vectors, zeros, out + m * channel_);
  }

  // One image's kernel times its panels; of the input's gradient, what is of some of the output's channels.
  void multiply_panels(const Part<T>& part, const T* kernel, i64 rows, const T* x, i64 group, i64 output, i64 outputs,
                       const T* bias, T* out) {
    const i64 first = gradient ? output : 0, elements = gradient ? outputs : part.elements();
    static thread_local Buffer<T> panel, column, results, lasts, none;
    const Pixels<T>& pixels = part.pixels;
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
        multiply_panel(kernel, gradient ? shape_.taps() : ld_, rows, part.steps.data() + k,
                       from + k * vectors * kLanes<T>, vectors, depth, to, [&](i64 row, i64 now) {
                         // While the rows are in the innermost cache.
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

  // One image's kernel times its planes.
  void multiply_planes(const Part<T>& part, const T* kernel, i64 rows, const T* x, i64 group, const T* bias, T* out) {
    alignas(64) T sums[(kRows * kStrip + 1) * kLanes<T>];
    const i64 vectors = part.pixels.vectors(), channel = group * (seen_.in_channels / seen_.groups);
    for (i64 first = 0, strip; first < vectors; first += strip) {
      strip = vectors - first <= kStrip ? vectors - first : kStrip - 1;  // the last of any number, all others of threes
      part.pixels.prefetch(rows, first, strip, out);
      for (i64 v = first; v < first + strip;) {
        const int together = vectors_together(vectors - v);
        const T* from[kTogether];
        layout_.locate(x, channel, part.pixels, v, together, from);
        for (i64 k = 0; k < part.elements(); k += kDepth)
          multiply(kernel, gradient ? shape_.taps() : ld_, rows, part.steps.data() + k, from, together,
                   part.offsets() + k, min(kDepth, part.elements() - k), sums + (v - first) * kLanes<T>,
                   strip * kLanes<T>, k > 0);
        v += together;
      }
      part.pixels.write(sums, rows, first, strip, bias, out);
    }
  }

  const Problem<T, B>& problem_;
  const Shape& shape_;
  const Shape seen_;  // what is laid out, and convolved
  const Layout<T> layout_;
  std::vector<Part<T>> parts_;
  i64 group_;                    // channels of the result in a group
  i64 channel_, image_;          // strides of the result
  i64 images_, rows_, kernels_;  // at a time: images laid out, channels of the result, images' kernels
  i64 slice_;                    // output channels at a time of which a gradient is made
  i64 ld_, kernel_;              // elements from row to row of a mixed kernel, and of all of it
};

}  // namespace DYCONVERT_TARGET
