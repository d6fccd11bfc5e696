// The gradient of one image's kernel by Winograd's filtering, G^T [sum of tiles (A dy A^T) * (B^T d B)] G.
#pragma once
#include "base/multiply.h"
#include "base/planes.h"
#include "base/transpose.h"
#include "winograd/filtering.h"

namespace DYCONVERT_TARGET {

template <typename T>
class TileProducts {
 public:
  // width: channels of a channel panel.
  TileProducts(const Shape& s, i64 width)
      : shape_(whole_tiles(s)),
        height_(s.out_height),
        across_(shape_.out_width / Winograd::tile),
        tiles_(across_ * shape_.out_height / Winograd::tile),
        ld_(rounded_up(tiles_, kLanes<T>)),
        planes_(shape_),
        width_(width),
        out_width_(s.out_width) {
    for (i64 tile = 0; tile < tiles_; tile++) {
      steps_.push_back(tile);
      offsets_.push_back(tile * width);
    }
  }

  // Elements of a channel panel of the input's transformed tiles: [36, tiles, width].
  i64 panel() const { return Winograd::elements * tiles_ * width_; }

  // Elements of the transformed gradient of an image's output: [C_out, 36, ld].
  i64 grad_elements() const { return shape_.out_channels * Winograd::elements * ld_; }

  void lay_out_grad(const T* grad, i64 images, T* to, ParallelFor parallel_for) const {
    const i64 planes = images * shape_.out_channels, pixels = shape_.pixels();
    parallel(parallel_for, planes, grain_of(8 * pixels), [&](i64 begin, i64 end) {
      static thread_local Buffer<T> buffer;
      // The plane has zeros beyond the output, also where the last vector reads beyond the tiles.
      const i64 size = pixels + Winograd::tile * shape_.out_width * (kLanes<T> + 1);
      T* plane = buffer.of(size);
      std::fill(plane, plane + size, T(0));
      for (; begin < end; begin++) {
        const T* from = grad + begin * height_ * out_width_;
        for (i64 y = 0; y < height_; y++) copy(plane + y * shape_.out_width, from + y * out_width_, out_width_);
        transform_grad(plane, to + begin * Winograd::elements * ld_);
      }
    });
  }

  // Lays out up to one vector of channels at `to` in a channel panel.
  void lay_out(const T* x, i64 channels, T* to) const {
    static thread_local Buffer<T> planes_buffer, pixels_buffer;
    T* planes = planes_buffer.of(kLanes<T> * planes_.plane);
    T* pixels = pixels_buffer.of(kLanes<T> * planes_.plane);
    planes_.clear(planes, kLanes<T>);
    for (i64 c = 0; c < channels; c++) planes_.lay_out(x + c * shape_.x_channel, 1, planes + c * planes_.plane);
    transpose(planes, planes_.plane, kLanes<T>, planes_.plane, pixels, kLanes<T>);
    const i64 pitch = planes_.pitch(), apart = tiles_ * width_;
    for (i64 tile = 0; tile < tiles_; tile++, to += width_) {
      const T* from = pixels + (tile / across_ * pitch + tile % across_) * Winograd::tile * kLanes<T>;
      Vector<T> d[Winograd::size][Winograd::size];
#pragma GCC unroll 36
      for (int e = 0; e < Winograd::elements; e++)
        d[e / Winograd::size][e % Winograd::size] = load(from + (e / Winograd::size * pitch + e % Winograd::size) * kLanes<T>);
      both_axes<Winograd::size, Winograd::size>(
          d, [](const auto& along, auto& result) { Winograd::input(along, result); },
          [&](int i, int k, Vector<T> value) { store(to + (i * Winograd::size + k) * apart, value); });
    }
  }

  // to[taps, rows, lanes]: the gradients of `rows` output channels from `channel` on, and of the channels in x.
  // grad: of an image's output, as `lay_out_grad` leaves it.
  void multiply_image(const T*, const T* grad, i64 channel, i64 rows, const T* x, i64 lanes, T* to) const {
    static thread_local Buffer<T> buffer;
    const int together = width_ / kLanes<T>;
    const i64 apart = rows * width_ + 64 / sizeof(T);
    T* products = buffer.of(Winograd::elements * apart);
    grad += channel * Winograd::elements * ld_;
    for (i64 lane = 0; lane < lanes; lane += width_, x += panel()) {
      for (int e = 0; e < Winograd::elements; e++) {
        const T* from[kTogether];
        for (int j = 0; j < together; j++) from[j] = x + e * tiles_ * width_ + j * kLanes<T>;
        multiply(grad + e * ld_, Winograd::elements * ld_, rows, steps_.data(), from, together, offsets_.data(), tiles_,
                 products + e * apart, width_, false);
      }
      for (i64 at = 0; at < rows * width_; at += kLanes<T>) {
        T* taps = to + at / width_ * lanes + lane + at % width_;
        Vector<T> u[Winograd::size][Winograd::size];
#pragma GCC unroll 36
        for (int e = 0; e < Winograd::elements; e++)
          u[e / Winograd::size][e % Winograd::size] = load(products + e * apart + at);
        both_axes<Winograd::size, 3>(
            u, [](const auto& along, auto& result) { Winograd::kernel_gradient(along, result); },
            [&](int i, int k, Vector<T> value) { store(taps + (i * 3 + k) * rows * lanes, value); });
      }
    }
  }

 private:
  // The shape of the conv with its output rounded up to whole tiles.
  static Shape whole_tiles(Shape s) {
    s.out_height = rounded_up(s.out_height, Winograd::tile);
    s.out_width = rounded_up(s.out_width, Winograd::tile);
    return s;
  }

  void transform_grad(const T* plane, T* to) const {
    for (i64 tile = 0; tile < tiles_; tile += kLanes<T>) {
      const T* at[kLanes<T>];
      for (i64 t = 0; t < kLanes<T>; t++)
        at[t] = plane + ((tile + t) / across_ * shape_.out_width + (tile + t) % across_) * Winograd::tile;
      Vector<T> y[Winograd::tile][Winograd::tile];
#pragma GCC unroll 4
      for (int i = 0; i < Winograd::tile; i++) load_columns(at, i * shape_.out_width, y[i]);
      both_axes<Winograd::tile, Winograd::size>(
          y, [](const auto& along, auto& result) { Winograd::output_gradient(along, result); },
          [&](int i, int k, Vector<T> value) { store(to + (i * Winograd::size + k) * ld_ + tile, value); });
    }
  }

  const Shape shape_;
  const i64 height_;  // of the output
  const i64 across_, tiles_, ld_;
  const Planes<T> planes_;
  const i64 width_, out_width_;
  std::vector<int32_t> steps_, offsets_;  // of tiles: in the output's gradient, and in a channel panel
};

}  // namespace DYCONVERT_TARGET
