// From the gradient of images' kernels to those of the bank and the coefficients, the derivatives of DyNet's eq. 1:
//   d bank[i] = sum_n eta[n, i] d kernel[n],   d eta[n, i] = <bank[i], d kernel[n]>.
// Where the kernels have factors, what stands here for d kernel is its product with them, and
//   d factors[n] = sum of sum_i eta[n, i] bank[i] * d kernel[n] over a group's output channels.
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
  const T* factors;  // [N, factor_groups, K], contiguous, or null
  T* grad_bank;   // as the bank, or null: not wanted
  T* grad_eta;    // as the coefficients, contiguous, or null
  T* grad_factors;  // as the factors, or null

  i64 expert() const { return shape.out_channels * shape.elements(); }
  // Elements of all images' factors.
  i64 all_factors() const { return shape.images * shape.factor_groups * shape.elements(); }
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

// From the gradients of kernels, [images, rows, ld], to those of what was mixed, in place: their product with the
// factors. The factors' own gradient is added to grad_factors, [N, factor_groups, K]; null: not wanted.
// k: which of a row's elements is the first.
template <typename T>
void take_factors(const Gradients<T>& to, i64 image, i64 images, i64 channel, i64 rows, i64 k, i64 length, i64 ld,
                  T* kernels, const BankPart<T>& part, T* grad_factors) {
  const Shape& s = to.shape;
  for (i64 row = 0; row < rows; row++)
    for (i64 j = 0; j < images; j++) {
      const i64 at = s.factors_at(image + j, channel + row) + k;
      const T* eta = to.eta + (image + j) * s.eta_image + (channel + row) * s.eta_channel;
      const T* bank = part.bank + row * part.row;
      T* kernel = kernels + (j * rows + row) * ld;
      i64 e = 0;
      for (; e + kLanes<T> <= length; e += kLanes<T>) {
        const Vector<T> gradient = load(kernel + e);
        if (grad_factors) {
          Vector<T> mixed{};
          for (i64 i = 0; i < s.g; i++) mixed += eta[i * s.eta_expert] * load(bank + i * part.expert + e);
          store(grad_factors + at + e, load(grad_factors + at + e) + mixed * gradient);
        }
        store(kernel + e, gradient * load(to.factors + at + e));
      }
      for (; e < length; e++) {
        if (grad_factors) {
          T mixed = 0;
          for (i64 i = 0; i < s.g; i++) mixed += eta[i * s.eta_expert] * bank[i * part.expert + e];
          grad_factors[at + e] += mixed * kernel[e];
        }
        kernel[e] *= to.factors[at + e];
      }
    }
}

// Part of the kernels' gradients of `rows` output channels from `channel` on, for `images` images from `image` on:
// kernels[images, rows, ld], of which `length` elements of each row count, the first of them its k-th.
// grad_eta: [N, g, per], added to; so is grad_factors. The bank's gradient is added to if `add`, else written.
template <typename T>
void reduce(const Gradients<T>& to, i64 image, i64 images, i64 channel, i64 rows, i64 k, i64 length, i64 ld, T* kernels,
            const BankPart<T>& part, T* grad_eta, T* grad_factors, bool add) {
  const Shape& s = to.shape;
  if (to.factors) take_factors(to, image, images, channel, rows, k, length, ld, kernels, part, grad_factors);
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
