// A dynamic conv of 3 x 3 and stride 1, and the gradient of its input, by Winograd's filtering. Mixing is linear, so
// kernels are mixed first and transformed then: some channels at a time, which are used while they are in cache.
#pragma once
#include "base/mix.h"
#include "base/phases.h"
#include "winograd/tiles.h"

namespace DYCONVERT_TARGET {

// The cost of Winograd's filtering, in vectors multiplied per pair of channels: 36 for each vector of tiles, and
// transforms. As measured, that of a kernel takes as long as 30, and that of a vector of tiles, or of results, as long
// as 530, once per channel.
template <typename T>
inline double winograd_cost(const Shape& s) {
  const bool fits = s.kernel_height == 3 && s.kernel_width == 3 && s.stride_y == 1 && s.stride_x == 1 &&
                    s.dilation_y == 1 && s.dilation_x == 1;
  if (!fits) return __builtin_inf();
  const i64 tiles = divided_up(s.out_height, Winograd::tile) * divided_up(s.out_width, Winograd::tile);
  const double transforms = 530. / s.group_in() + 530. / s.group_out();
  return 30 + divided_up(tiles, kLanes<T>) * (Winograd::elements + transforms);
}

// Whether it is less than that of planes, which multiply each vector of pixels by all taps.
template <typename T>
inline bool winograd_pays(const Shape& s) {
  return winograd_cost<T>(s) < s.taps() * vectors_of_planes<T>(s);
}

// For the input's gradient, the problem's x is the output's gradient, and its out is the input's.
template <typename T, typename B, Task task>
class WinogradConv {
 public:
  static constexpr bool gradient = task == Task::kInputGradient;

  explicit WinogradConv(const Problem<T, B>& problem)
      : problem_(problem),
        shape_(problem.shape),
        conv_shape_(gradient ? gradient_as_unit_stride_conv(shape_) : shape_),
        tiles_(conv_shape_, gradient ? Grid{shape_.height, shape_.width, shape_.height * shape_.width, shape_.width, 1}
                               : Grid{shape_.out_height, shape_.out_width, shape_.out_channel,
                                      shape_.out_width * shape_.out_pixel, shape_.out_pixel}) {
    const Shape& s = shape_;
    read_channels_ = gradient ? s.group_out() : s.group_in();
    result_channels_ = gradient ? s.group_in() : s.group_out();
    image_ = gradient ? s.in_channels * s.height * s.width : s.out_channels * s.pixels();
    channel_ = gradient ? s.height * s.width : s.out_channel;
    images_ = max<i64>(1, min(s.images, kLaidOut / tiles_.image()));
    // A kernel with its channels last can't be split by channels: each tap has all of them.
    depth_ = s.bank_last ? read_channels_ : divided_up(read_channels_, divided_up(read_channels_, kDepth));
    ld_ = rounded_up(depth_, kLanes<T>);
    const i64 most = max<i64>(4, min(kRows, kTransformed / (elements * ld_)));
    rows_ = rows_together(result_channels_, most, s.groups * images_, s.threads);
    apart_ = rows_ * ld_ + 64 / sizeof(T);  // see `TilePanel::apart`
    whole_ = depth_ == read_channels_;
    held_ = elements * rows_ * kLanes<T> * (whole_ ? kTogether : tiles_.vectors());
    together_ = max<i64>(1, kHeld / held_);
    kernel_ = rows_ * depth_ * 9;
    mixed_ = max<i64>(1, min(together_, kMixedTogether / kernel_));
    for (i64 k = 0; k < depth_; k++) steps_.push_back(k);
  }

  i64 scratch_elements() const { return images_ * tiles_.image(); }

  void compute() {
    const Shape& s = shape_;
    const i64 blocks = divided_up(result_channels_, rows_);
    const i64 grain = grain_of(rows_ * read_channels_ * elements * tiles_.vectors() * kLanes<T>);
    for (i64 first = 0; first < s.images; first += images_)
      for (i64 band = 0; band < tiles_.down(); band += tiles_.band()) {
        const i64 count = min(images_, s.images - first);
        tiles_.lay_out(problem_.x + first * conv_shape_.x_image, count, band, problem_.scratch, problem_.parallel_for);
        parallel(problem_.parallel_for, s.groups * blocks * count, grain, [&](i64 begin, i64 end) {
          while (begin < end) {
            const i64 block = begin / count, n = begin % count, images = min(min(count - n, end - begin), together_);
            const i64 row = block % blocks * rows_;
            convolve(problem_.scratch + n * tiles_.image(), first + n, images, block / blocks, row,
                     min(rows_, result_channels_ - row), band);
            begin += images;
          }
        });
      }
  }

 private:
  static constexpr int elements = Winograd::elements;
  // Input channels at a time, channels of the result in a block, and elements of their transformed kernels, which
  // should stay in a core's cache.
  static constexpr i64 kDepth = 128, kRows = 32, kTransformed = 64 * 1024;
  // Elements of sums that are kept until the next input channels are added, and of kernels that are mixed at a time.
  static constexpr i64 kHeld = 256 * 1024, kMixedTogether = 128 * 1024;

  // The gradient as a conv of the output's gradient, with the kernel rotated by 180 degrees.
  static Shape gradient_as_unit_stride_conv(const Shape& s) {
    Shape conv = gradient_as_conv(s);
    conv.out_height = s.height;
    conv.out_width = s.width;
    return conv;
  }

  // Computes `rows` channels of the result, in one group, for some images.
  void convolve(const T* x, i64 image, i64 images, i64 group, i64 row, i64 rows, i64 band) {
    static thread_local Buffer<T> mixed, transformed, summed, biases;
    T* kernels = mixed.of(mixed_ * kernel_ + 9 * rows_ * kLanes<T>);  // vectors read beyond the last kernel
    T* u = transformed.of(elements * apart_);
    T* sums = summed.of((whole_ ? 1 : images) * held_);
    T* bias = biases.of(rows_);
    const i64 channel = group * result_channels_ + row;
    for (i64 k = 0; k < read_channels_; k += depth_) {
      const i64 depth = min(depth_, read_channels_ - k);
      for (i64 n = 0; n < images; n++) {
        if (n % mixed_ == 0) mix_channels(image + n, min(mixed_, images - n), group, row, rows, k, depth, kernels);
        transform(kernels + n % mixed_ * rows * depth * 9, rows, depth, u);
        const bool last = k + depth == read_channels_;
        if (last)
          for (i64 r = 0; r < rows; r++) bias[r] = gradient ? T(0) : mixed_bias(problem_, image + n, channel + r);
        for (size_t p = 0; p < tiles_.panels().size(); p++) {
          const auto& panel = tiles_.panels()[p];
          T* to = sums + (whole_ ? 0 : n * held_ + elements * rows * kLanes<T> * panel.vector);
          multiply_panel(panel, x + n * tiles_.image() + tiles_.at(p), group * read_channels_ + k, u, rows, depth, to,
                         k > 0);
          if (last) tiles_.write(panel, to, rows, band, bias, problem_.out + (image + n) * image_ + channel * channel_);
        }
      }
    }
  }

  // Mixes the kernels of some images: [images, rows, depth, 9]; for the gradient, [images, depth, rows, 9].
  void mix_channels(i64 image, i64 images, i64 group, i64 row, i64 rows, i64 k, i64 depth, T* kernels) const {
    if constexpr (gradient)
      mix(problem_, image, images, group * read_channels_ + k, depth, row * 9, rows * 9, rows * 9, kernels);
    else
      mix(problem_, image, images, group * result_channels_ + row, rows, k * 9, depth * 9, depth * 9, kernels);
  }

  // u[36, rows, ld] = G g G^T.
  void transform(const T* kernels, i64 rows, i64 depth, T* u) const {
    constexpr int size = Winograd::size;
    const bool last = !gradient && shape_.bank_last;
    const i64 ld = gradient ? rows * 9 : 9;
    for (i64 r = 0; r < rows; r++)
      for (i64 k = 0; k < depth; k += kLanes<T>) {
        Vector<T> taps[9], g[3][3];
        if (last)
          for (int tap = 0; tap < 9; tap++) taps[tap] = load(kernels + r * depth * 9 + tap * depth + k);
        else
          take_taps(kernels + (gradient ? (k * rows + r) * 9 : (r * depth + k) * 9), ld, taps);
#pragma GCC unroll 9
        for (int tap = 0; tap < 9; tap++) g[tap / 3][tap % 3] = taps[gradient ? 8 - tap : tap];
        T* to = u + r * ld_ + k;
        both_axes<3, size>(
            g, [](const auto& from, auto& column) { Winograd::kernel(from, column); },
            [&](int i, int j, Vector<T> value) { store(to + (i * size + j) * apart_, value); });
      }
  }

  // taps[tap]: that tap of as many kernels as a vector has lanes; they are ld apart.
  static void take_taps(const T* kernels, i64 ld, Vector<T> (&taps)[9]) {
    constexpr int n = kLanes<T>;
    for (int first = 0; first < 8; first += 4) {
      Vector<T> columns[4];
      load_columns(kernels + first, ld, columns);
      for (int j = 0; j < 4; j++) taps[first + j] = columns[j];
    }
    alignas(64) T rest[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) rest[i] = kernels[i * ld + 8];
    taps[8] = load(rest);
  }

  // Multiplies `depth` input channels from `channel` on: sums[36, rows, width].
  void multiply_panel(const typename Tiles<T>::TilePanel& panel, const T* x, i64 channel, const T* u, i64 rows,
                      i64 depth, T* sums, bool add) const {
    const i64 width = panel.width();
    const T* at = x + channel * width;
    for (int e = 0; e < elements; e++, at += panel.apart(conv_shape_.in_channels)) {
      const T* from[kTogether];
      for (int j = 0; j < panel.together; j++) from[j] = at + j * kLanes<T>;
      multiply(u + e * apart_, ld_, rows, steps_.data(), from, panel.together, panel.offsets.data(), depth,
               sums + e * rows * width, width, add);
    }
  }

  const Problem<T, B>& problem_;
  const Shape& shape_;
  const Shape conv_shape_;  // the conv that is computed
  const Tiles<T> tiles_;
  i64 read_channels_, result_channels_;  // channels of a group: of x, and of the result
  i64 image_, channel_;     // strides of the result
  i64 images_, depth_, rows_, mixed_, together_;  // at a time: images laid out, input channels, channels of the result,
                                                  // images mixed, images with sums
  i64 ld_, apart_, kernel_, held_;  // elements: from row to row and from element to element of a transformed
                                    // kernel, of a mixed kernel, of an image's sums
  bool whole_;              // whether all input channels are taken at once
  std::vector<int32_t> steps_;
};

}  // namespace DYCONVERT_TARGET
