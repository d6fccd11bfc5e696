// The microtile of output channels: a few pixels times a vector whose lanes are output channels. Each lane has a kernel
// of its own, so the pixels are broadcast, and no lane is empty on a map of any width.
#pragma once
#include "base/vector.h"

namespace DYCONVERT_TARGET {

// The most pixels of a microtile. On Zen 4, 7 sums in registers reach the peak; more only hold the rows of wider maps.
constexpr int kTilePixels = 10;

// A tap of the kernel, for the pixels of one microtile.
struct TileTap {
  int32_t tap, offset;  // offset: of what the first pixel reads, in a plane
  bool first, last;     // whether the first pixel and the last read the input; else they read padding
};

// sums[p] += sum_k weights[k] * x[k * plane + p], for the pixels [begin, end).
template <typename T, int P, int begin, int end>
inline __attribute__((always_inline)) void add_tap(Vector<T> (&sums)[P], const T* __restrict weights,
                                                   const T* __restrict x, i64 plane, i64 channels) {
  for (i64 k = 0; k < channels; k++, weights += kLanes<T>, x += plane) {
    const Vector<T> weight = load(weights);
#pragma GCC unroll 16
    for (int p = begin; p < end; p++) sums[p] += x[p] * weight;
  }
}

// Adds to sums[P] the products of P pixels and a vector of output channels. weights: [taps, channels, lanes].
template <typename T, int P>
void add_channel_tile(const T* weights, const T* x, i64 plane, i64 channels, const TileTap* tap, const TileTap* end,
                      T* to) {
  Vector<T> sums[P];
  for (int p = 0; p < P; p++) sums[p] = load(to + p * kLanes<T>);
  for (; tap < end; tap++) {
    const T* tap_weights = weights + tap->tap * channels * kLanes<T>;
    const T* from = x + tap->offset;
    if (tap->first && tap->last)
      add_tap<T, P, 0, P>(sums, tap_weights, from, plane, channels);
    else if (tap->first)
      add_tap<T, P, 0, P - 1>(sums, tap_weights, from, plane, channels);
    else if (tap->last)
      add_tap<T, P, 1, P>(sums, tap_weights, from, plane, channels);
    else
      add_tap<T, P, 1, P - 1>(sums, tap_weights, from, plane, channels);
  }
  for (int p = 0; p < P; p++) store(to + p * kLanes<T>, sums[p]);
}

template <typename T>
using ChannelTile = void (*)(const T*, const T*, i64, i64, const TileTap*, const TileTap*, T*);

// Functions by their number of pixels, from one on.
template <typename T, int... p>
constexpr std::array<ChannelTile<T>, sizeof...(p)> channel_tiles(std::integer_sequence<int, p...>) {
  return {add_channel_tile<T, p + 1>...};
}
template <typename T>
constexpr auto kChannelTiles = channel_tiles<T>(std::make_integer_sequence<int, kTilePixels>{});

}  // namespace DYCONVERT_TARGET
