// A predictor's linear layer, whose weights may have fewer bits. For a few images, reading the weights takes most of
// the time.
#pragma once
#include "base/half.h"
#include "base/parallel.h"

namespace DYCONVERT_TARGET {

// Vectors of sums: so many hide the latency of an addition.
constexpr int kLinearSums = 4;

// out[n * outputs] = sum_k x[n * inputs + k] w[k] scale + bias, for N images.
template <typename B, int N>
inline void linear_row(const float* x, i64 inputs, const B* w, float scale, float bias, float* out, i64 outputs) {
  constexpr i64 lanes = kLanes<float>;
  constexpr int J = kLinearSums / N > 0 ? kLinearSums / N : 1;
  Vector<float> sums[N][J] = {};
  i64 k = 0;
  for (; k + J * lanes <= inputs; k += J * lanes)
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) {
      const Vector<float> weights = load_as<float>(w + k + j * lanes);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sums[n][j] += weights * load(x + n * inputs + k + j * lanes);
    }
  for (; k + lanes <= inputs; k += lanes) {
    const Vector<float> weights = load_as<float>(w + k);
    for (int n = 0; n < N; n++) sums[n][0] += weights * load(x + n * inputs + k);
  }
  for (int n = 0; n < N; n++) {
    for (int j = 1; j < J; j++) sums[n][0] += sums[n][j];
    float sum = sum_of<float>(sums[n][0]);
    for (i64 rest = k; rest < inputs; rest++) sum += x[n * inputs + rest] * value_of(w[rest]);
    out[n * outputs] = sum * scale + bias;
  }
}

template <typename B>
void linear(const DyconvertLinear& layer, ParallelFor parallel_for) {
  const B* weights = static_cast<const B*>(layer.weights);
  parallel(parallel_for, layer.outputs, grain_of(layer.images * layer.inputs), [&](i64 begin, i64 end) {
    for (i64 row = begin; row < end; row++) {
      const B* w = weights + row * layer.inputs;
      const float scale = layer.scale ? layer.scale[row] : 1, bias = layer.bias ? layer.bias[row] : 0;
      for (i64 n = 0; n < layer.images;) {
        const float* x = layer.x + n * layer.inputs;
        float* out = layer.out + n * layer.outputs + row;
        if (layer.images - n >= 8)
          linear_row<B, 8>(x, layer.inputs, w, scale, bias, out, layer.outputs), n += 8;
        else if (layer.images - n >= 4)
          linear_row<B, 4>(x, layer.inputs, w, scale, bias, out, layer.outputs), n += 4;
        else
          linear_row<B, 1>(x, layer.inputs, w, scale, bias, out, layer.outputs), n++;
      }
    }
  });
}

}  // namespace DYCONVERT_TARGET
