// From the gradient of images' kernels to those of the bank and the coefficients, the derivatives of DyNet's eq. 1:
//   d bank[i] = sum_n eta[n, i] d kernel[n],   d eta[n, i] = <bank[i], d kernel[n]>.
#pragma once
#include "base/problem.h"

namespace DYCONVERT_TARGET {

// What the gradients of a bank and its coefficients are made of, and where they go.
template <typename T>
struct Gradients {
  const Shape& shape;
  ParallelFor parallel_for;
  const T* grad;  // of the output, [N, C_out, oH, oW], contiguous
  const T* x;     // [N, C_in, H, W]
  const T* bank;  // [g, C_out, K]
  const T* eta;   // [N, g, 1] or [N, g, C_out]
  T* grad_bank;   // as the bank, or null: not wanted
  T* grad_eta;    // as the coefficients, contiguous, or null

  i64 expert() const { return shape.out_channels * shape.elements(); }
  // Coefficients that an expert has for an image.
  i64 per() const { return shape.eta_channel ? shape.out_channels : 1; }
};

// Images whose kernels' gradients are reduced together.
constexpr i64 kReduced = 4;

// Part of one output channel's kernels' gradients, [J, length] of J images, `apart` from each other.
// eta: [J, g]; dots: [J, g], added to. grad_bank is added to if `add`, else written; null: not wanted.
template <typename T, int J>
void reduce_row(const T* kernels, i64 apart, i64 length, const T* bank, T* grad_bank, i64 expert, i64 g, const T* eta,
                T* dots, bool add) {
  for (i64 i = 0; i < g; i++, bank += expert) {
    Vector<T> sums[J] = {};
    T own[J];
    for (int j = 0; j < J; j++) own[j] = eta[j * g + i];
    i64 k = 0;
    for (; k + kLanes<T> <= length; k += kLanes<T>) {
      const Vector<T> weights = load(bank + k);
      Vector<T> sum = add && grad_bank ? load(grad_bank + k) : Vector<T>{};
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) {
        const Vector<T> gradient = load(kernels + j * apart + k);
        sums[j] += weights * gradient;
        sum += own[j] * gradient;
      }
      if (grad_bank) store(grad_bank + k, sum);
    }
    for (int j = 0; j < J; j++) {
      T dot = sum_of<T>(sums[j]);
      for (i64 rest = k; rest < length; rest++) dot += bank[rest] * kernels[j * apart + rest];
      dots[j * g + i] += dot;
    }
    if (!grad_bank) continue;
    for (; k < length; k++) {
      T sum = add ? grad_bank[k] : T(0);
      for (int j = 0; j < J; j++) sum += own[j] * kernels[j * apart + k];
      grad_bank[k] = sum;
    }
    grad_bank += expert;
  }
}

// Where a part of the bank and of its gradient lie: rows of output channels, of each expert.
template <typename T>
struct BankPart {
  const T* bank;
  T* grad;  // or null: not wanted
  i64 row, expert;  // strides
};

// Part of the kernels' gradients of `rows` output channels from `channel` on, for `images` images from `image` on:
// kernels[images, rows, ld], of which `length` elements of each row count.
// grad_eta: [N, g, per], added to. The bank's gradient is added to if `add`, else written.
template <typename T>
void reduce(const Gradients<T>& to, i64 image, i64 images, i64 channel, i64 rows, i64 length, i64 ld, const T* kernels,
            const BankPart<T>& part, T* grad_eta, bool add) {
  const Shape& s = to.shape;
  const i64 per = to.per();
  T eta[kReduced * 64], dots[kReduced * 64];  // `native.py` sees to it that g is at most 64
  const i64 apart = rows * ld;
  if (per == 1 && length == part.row && length == ld) {  // rows one behind the other, reduced alike
    length *= rows;
    rows = 1;
  }
  for (i64 row = 0; row < rows; row++) {
    for (i64 j = 0; j < images; j++)
      for (i64 i = 0; i < s.g; i++) {
        eta[j * s.g + i] = to.eta[(image + j) * s.eta_image + i * s.eta_expert + (channel + row) * s.eta_channel];
        dots[j * s.g + i] = 0;
      }
    const auto reduced = images == 4   ? reduce_row<T, 4>
                         : images == 3 ? reduce_row<T, 3>
                         : images == 2 ? reduce_row<T, 2>
                                       : reduce_row<T, 1>;
    reduced(kernels + row * ld, apart, length, part.bank + row * part.row,
            part.grad ? part.grad + row * part.row : nullptr, part.expert, s.g, eta, dots, add);
    for (i64 j = 0; j < images; j++)
      for (i64 i = 0; i < s.g; i++)
        grad_eta[((image + j) * s.g + i) * per + (per == 1 ? 0 : channel + row)] += dots[j * s.g + i];
  }
}

// to[k] = sum of from[part, k], for k < length.
template <typename T>
void sum_parts(ParallelFor parallel_for, const T* from, i64 parts, i64 length, bool add, T* to) {
  parallel(parallel_for, length, 16384, [&](i64 begin, i64 end) {
    for (i64 k = begin; k < end; k++) {
      T sum = add ? to[k] : T(0);
      for (i64 part = 0; part < parts; part++) sum += from[part * length + k];
      to[k] = sum;
    }
  });
}

}  // namespace DYCONVERT_TARGET
