// Lays out the input of a conv by Winograd's filtering as vectors of transformed tiles; transforms tiles of results
// back and writes them.
#pragma once
#include "base/multiply.h"
#include "base/planes.h"
#include "base/transpose.h"
#include "winograd/filtering.h"

namespace DYCONVERT_TARGET {

// Tiles of 4 x 4 results, row by row, in vectors. A panel has as many vectors as `multiply` takes.
template <typename T>
class Tiles {
 public:
  // Elements of a cache line.
  static constexpr i64 kLine = 64 / sizeof(T);

  struct TilePanel {
    i64 vector;    // the panel's first
    int together;  // vectors
    std::vector<int32_t> offsets;  // of the channels

    i64 width() const { return together * kLanes<T>; }
    // From one element of the tiles to the next, of all `channels`. One cache line more than they need: without it, a
    // tile's 36 elements would often map to the same cache set.
    i64 apart(i64 channels) const { return channels * width() + kLine; }
  };

  // s: the conv that is computed; grid: where results are written.
  Tiles(const Shape& s, const Grid& grid)
      : shape_(s), grid_(grid), across_(divided_up(s.out_width, Winograd::tile)), down_(divided_up(s.out_height, Winograd::tile)) {
    const i64 most = kLaidOut / (Winograd::elements * s.in_channels * across_);
    band_ = divided_up(down_, divided_up(down_, max<i64>(1, min(down_, most))));
    pitch_ = across_ * Winograd::tile + Winograd::size - Winograd::tile;
    plane_ = (band_ * Winograd::tile + Winograd::size - Winograd::tile) * pitch_;
    vectors_ = divided_up(band_ * across_, kLanes<T>);
    for (i64 tile = 0; tile < vectors_ * kLanes<T>; tile++) {
      const i64 x = tile % across_ * Winograd::tile, y = tile / across_ * Winograd::tile;
      // Lanes beyond the last tile read some other tile, and are placed below the last row, where nothing is written.
      places_.push_back(y < band_ * Winograd::tile ? Place{x, y, y * pitch_ + x} : Place{0, down_ * Winograd::tile, 0});
    }
    for (i64 v = 0; v < vectors_;) {
      TilePanel panel{v, vectors_together(vectors_ - v), {}};
      for (i64 channel = 0; channel < s.in_channels / s.groups; channel++)
        panel.offsets.push_back(channel * panel.width());
      v += panel.together;
      panels_.push_back(panel);
    }
  }

  // Rows of tiles of a map, and of a band: as many as are laid out at a time.
  i64 down() const { return down_; }
  i64 band() const { return band_; }
  i64 vectors() const { return vectors_; }
  const std::vector<TilePanel>& panels() const { return panels_; }
  // Elements of an image's band, laid out: panel by panel [36, channels, width].
  i64 image() const { return at(panels_.size()); }
  // Where a panel starts in an image's band.
  i64 at(i64 panel) const {
    const i64 vector = panel < i64(panels_.size()) ? panels_[panel].vector : vectors_;
    return Winograd::elements * (shape_.in_channels * vector * kLanes<T> + panel * kLine);
  }

  // B^T d B of the rows of tiles from `row` on, of `images` images.
  void lay_out(const T* x, i64 images, i64 row, T* to, ParallelFor parallel_for) const {
    const Shape& s = shape_;
    // With channels last, a line of the cache has several channels of one pixel.
    const i64 together = s.x_channel == 1 ? min(s.in_channels, kLine) : 1, blocks = divided_up(s.in_channels, together);
    parallel(parallel_for, images * blocks, grain_of(8 * together * plane_), [&](i64 begin, i64 end) {
      static thread_local Buffer<T> buffer;
      T* planes = buffer.of(together * plane_ + kLanes<T>);
      std::fill(planes, planes + together * plane_, T(0));
      for (; begin < end; begin++) {
        const i64 n = begin / blocks, first = begin % blocks * together, channels = min(together, s.in_channels - first);
        pad(x + n * s.x_image + first * s.x_channel, channels, row, planes);
        for (i64 c = 0; c < channels; c++)
          for (size_t p = 0; p < panels_.size(); p++)
            transform(planes + c * plane_, panels_[p], to + n * image() + at(p) + (first + c) * panels_[p].width());
      }
    });
  }

  // Writes A^T s A plus the bias for one panel of the band that starts at row `row` of tiles. sums: [36, rows, width],
  // of `rows` channels of the result.
  void write(const TilePanel& panel, const T* sums, i64 rows, i64 row, const T* bias, T* out) const {
    const i64 width = panel.width(), apart = rows * width;
    for (int j = 0; j < panel.together; j++, sums += kLanes<T>) {
      const Place* places = places_.data() + (panel.vector + j) * kLanes<T>;
      Vector<T> y[Winograd::tile][Winograd::tile];
      if (grid_.channel == 1)
        for (i64 r = 0; r < rows; r += kLanes<T>)
          write_channels_last(places, sums + r * width, width, apart, min(kLanes<T>, rows - r), row, bias + r, out + r);
      else
        for (i64 r = 0; r < rows; r++) {
          transform_back(sums + r * width, apart, bias[r], y);
          write_tiles(places, y, row, out + r * grid_.channel);
        }
    }
  }

 private:
  struct Place {
    i64 x, y;    // of the tile's first result, counted from the band's first row
    i64 offset;  // of the first element that the tile reads in a padded plane
  };

  // y[i][k]: the results at (i, k) of a vector's tiles.
  static void transform_back(const T* sums, i64 apart, T bias, Vector<T> (&y)[Winograd::tile][Winograd::tile]) {
    Vector<T> s[Winograd::size][Winograd::size];
#pragma GCC unroll 36
    for (int e = 0; e < Winograd::elements; e++) s[e / Winograd::size][e % Winograd::size] = load(sums + e * apart);
    both_axes<Winograd::size, Winograd::tile>(
        s, [](const auto& from, auto& to) { Winograd::output(from, to); },
        [&](int i, int k, Vector<T> value) { y[i][k] = value + bias; });
  }

  // Writes up to one vector of channels, which lie one behind the other.
  void write_channels_last(const Place* places, const T* sums, i64 width, i64 apart, i64 channels, i64 row,
                           const T* bias, T* out) const {
    constexpr i64 n = kLanes<T>;
    alignas(64) T results[Winograd::tile][Winograd::tile][n * n], pixels[n * n];
    for (i64 c = 0; c < channels; c++) {
      Vector<T> y[Winograd::tile][Winograd::tile];
      transform_back(sums + c * width, apart, bias[c], y);
      for (int i = 0; i < Winograd::tile; i++)
        for (int k = 0; k < Winograd::tile; k++) store(results[i][k] + c * n, y[i][k]);
    }
    for (int i = 0; i < Winograd::tile; i++)
      for (int k = 0; k < Winograd::tile; k++) {
        transpose_square(results[i][k], n, pixels, n);
        for (i64 t = 0; t < n; t++) {
          const i64 y = row * Winograd::tile + places[t].y + i, x = places[t].x + k;
          if (y >= grid_.height || x >= grid_.width) continue;
          T* to = out + y * grid_.row + x * grid_.column;
          if (channels == n)
            store(to, load(pixels + t * n));
          else
            std::copy(pixels + t * n, pixels + t * n + channels, to);
        }
      }
  }

  void write_tiles(const Place* places, Vector<T> (&y)[Winograd::tile][Winograd::tile], i64 row, T* out) const {
    const Place& last = places[kLanes<T> - 1];
    bool whole = grid_.column == 1 && row * Winograd::tile + last.y + Winograd::tile <= grid_.height;
    for (i64 t = 0; t < kLanes<T>; t++) whole &= places[t].x + Winograd::tile <= grid_.width;
    out += row * Winograd::tile * grid_.row;
    for (int i = 0; i < Winograd::tile; i++) {
      turn(y[i]);
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        // Vector k has the rows of tiles k, k + 4 ...
        const auto place = [&](i64 f) -> const Place& { return places[k + 4 * f]; };
        if (whole) {
          store_fours<T>([&](i64 f) { return out + (place(f).y + i) * grid_.row + place(f).x; }, y[i][k]);
          continue;
        }
        alignas(64) T all[kLanes<T>];
        store(all, y[i][k]);
        for (i64 f = 0; f < kFours<T>; f++) write_row(place(f), row, i, all + 4 * f, out);
      }
    }
  }

  void write_row(const Place& place, i64 row, i64 i, const T* from, T* out) const {
    if (row * Winograd::tile + place.y + i >= grid_.height) return;
    T* to = out + (place.y + i) * grid_.row + place.x * grid_.column;
    for (i64 k = 0; k < min<i64>(grid_.width - place.x, Winograd::tile); k++) to[k * grid_.column] = from[k];
  }

  // Copies the rows of the input that a band reads. Columns of padding stay zero.
  void pad(const T* x, i64 channels, i64 row, T* to) const {
    const Shape& s = shape_;
    const i64 begin = max<i64>(0, s.padding_x), end = min(pitch_, s.width + s.padding_x);
    for (i64 r = 0; r < plane_ / pitch_; r++, to += pitch_) {
      const i64 y = row * Winograd::tile + r - s.padding_y;
      const T* from = x + y * s.x_row + (begin - s.padding_x) * s.x_column;
      if (y < 0 || y >= s.height)
        for (i64 c = 0; c < channels; c++) std::fill(to + c * plane_ + begin, to + c * plane_ + end, T(0));
      else if (s.x_column == 1 && channels == 1)
        copy(to + begin, from, end - begin);
      else if (s.x_channel == 1)
        transpose(from, s.x_column, end - begin, channels, to + begin, plane_);
      else
        for (i64 at = begin; at < end; at++, from += s.x_column)
          for (i64 c = 0; c < channels; c++) to[c * plane_ + at] = from[c * s.x_channel];
    }
  }

  void transform(const T* plane, const TilePanel& panel, T* to) const {
    const i64 pitch = pitch_, apart = panel.apart(shape_.in_channels);
    for (int j = 0; j < panel.together; j++, to += kLanes<T>) {
      const T* at[kLanes<T>];
      for (i64 t = 0; t < kLanes<T>; t++) at[t] = plane + places_[(panel.vector + j) * kLanes<T> + t].offset;
      Vector<T> d[Winograd::size][Winograd::size];
#pragma GCC unroll 6
      for (int i = 0; i < Winograd::size; i++) {
        // Columns 0 to 3, and 4 to 7, of which a tile has only 4 and 5.
        Vector<T> first[4], next[4];
        load_columns(at, i * pitch, first);
        load_columns(at, i * pitch + 4, next);
        for (int k = 0; k < Winograd::size; k++) d[i][k] = k < 4 ? first[k] : next[k - 4];
      }
      both_axes<Winograd::size, Winograd::size>(
          d, [](const auto& from, auto& column) { Winograd::input(from, column); },
          [&](int i, int k, Vector<T> value) { store(to + (i * Winograd::size + k) * apart, value); });
    }
  }

  const Shape shape_;
  const Grid grid_;
  const i64 across_, down_;  // tiles
  i64 band_, vectors_, pitch_, plane_;
  std::vector<Place> places_;  // of tiles
  std::vector<TilePanel> panels_;
};

}  // namespace DYCONVERT_TARGET
