// From the gradient of images' kernels to those of the bank and the coefficients, the derivatives of DyNet's eq. 1:
//   d bank[i] = sum_n eta[n, i] d kernel[n],   d eta[n, i] = <bank[i], d kernel[n]>.
// Where the kernels have factors, d kernel in these two is d kernel times the factors, and
//   d factors[n] = sum of sum_i eta[n, i] bank[i] * d kernel[n] over a group's output channels.
#pragma once
#include "base/problem.h"

namespace DYCONVERT_TARGET {

// The arguments of the bank's gradient, and where its results go.
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
  // Coefficients of one expert for one image.
  i64 per() const { return shape.eta_channel ? shape.out_channels : 1; }
};

// Images whose kernels' gradients are reduced together.
constexpr i64 kReduced = 4;

// Reduces `length` elements of the gradients of one output channel's kernels for J images, `apart` from each other.
// eta: [J, g]; dots: [J, g], added to. grad_bank is added to if `add`, else written; null: not wanted.
template <typename T, int J>
void reduce_row(const T* kernels, i64 apart, i64 length, const T* bank, T* grad_bank, i64 expert, i64 g, const T* eta,
                T* dots, bool add) {
  for (i64 i = 0; i < g; i++, bank += expert) {
    Vector<T> sums[J] = {};
    T coefficients[J];
    for (int j = 0; j < J; j++) coefficients[j] = eta[j * g + i];
    i64 k = 0;
    for (; k + kLanes<T> <= length; k += kLanes<T>) {
      const Vector<T> weights = load(bank + k);
      Vector<T> sum = add && grad_bank ? load(grad_bank + k) : Vector<T>{};
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) {
        const Vector<T> gradient = load(kernels + j * apart + k);
        sums[j] += weights * gradient;
        sum += coefficients[j] * gradient;
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
      for (int j = 0; j < J; j++) sum += coefficients[j] * kernels[j * apart + k];
      grad_bank[k] = sum;
    }
    grad_bank += expert;
  }
}

// Where the weights of a block of output channels lie in the bank, and their gradients.
template <typename T>
struct BankBlock {
  const T* bank;
  T* grad;  // or null: not wanted
  i64 row, expert;  // from one output channel to the next, and from one expert to the next
};

// Multiplies the kernels' gradients, [images, rows, ld], by the factors in place, which makes them gradients of the
// kernels before factors. Adds the factors' gradient to grad_factors, [N, factor_groups, K]; null: not wanted.
// k: the first of the row's elements that `kernels` has.
template <typename T>
void apply_factors(const Gradients<T>& to, i64 image, i64 images, i64 channel, i64 rows, i64 k, i64 length, i64 ld,
                   T* kernels, const BankBlock<T>& block, T* grad_factors) {
  const Shape& s = to.shape;
  for (i64 row = 0; row < rows; row++)
    for (i64 j = 0; j < images; j++) {
      const i64 at = s.factors_at(image + j, channel + row) + k;
      const T* eta = to.eta + (image + j) * s.eta_image + (channel + row) * s.eta_channel;
      const T* bank = block.bank + row * block.row;
      T* kernel = kernels + (j * rows + row) * ld;
      i64 e = 0;
      for (; e + kLanes<T> <= length; e += kLanes<T>) {
        const Vector<T> gradient = load(kernel + e);
        if (grad_factors) {
          Vector<T> mixed{};
          for (i64 i = 0; i < s.g; i++) mixed += eta[i * s.eta_expert] * load(bank + i * block.expert + e);
          store(grad_factors + at + e, load(grad_factors + at + e) + mixed * gradient);
        }
        store(kernel + e, gradient * load(to.factors + at + e));
      }
      for (; e < length; e++) {
        if (grad_factors) {
          T mixed = 0;
          for (i64 i = 0; i < s.g; i++) mixed += eta[i * s.eta_expert] * bank[i * block.expert + e];
          grad_factors[at + e] += mixed * kernel[e];
        }
        kernel[e] *= to.factors[at + e];
      }
    }
}

// Reduces kernels[images, rows, ld], gradients of the kernels of `rows` output channels from `channel` on, for `images`
// images from `image` on. Each row has elements [k, k + length) of its kernel.
// grad_eta: [N, g, per], added to; so is grad_factors. The bank's gradient is added to if `add`, else written.
template <typename T>
void reduce(const Gradients<T>& to, i64 image, i64 images, i64 channel, i64 rows, i64 k, i64 length, i64 ld, T* kernels,
            const BankBlock<T>& block, T* grad_eta, T* grad_factors, bool add) {
  const Shape& s = to.shape;
  if (to.factors) apply_factors(to, image, images, channel, rows, k, length, ld, kernels, block, grad_factors);
  const i64 per = to.per();
  T eta[kReduced * 64], dots[kReduced * 64];  // `native.py` sees to it that g is at most 64
  const i64 apart = rows * ld;
  if (per == 1 && length == block.row && length == ld) {  // rows one behind the other, reduced alike
    length *= rows;
    rows = 1;
  }
  for (i64 row = 0; row < rows; row++) {
    for (i64 j = 0; j < images; j++)
      for (i64 i = 0; i < s.g; i++) {
        eta[j * s.g + i] = to.eta[(image + j) * s.eta_image + i * s.eta_expert + (channel + row) * s.eta_channel];
        dots[j * s.g + i] = 0;
      }
    const auto reduce_images = images == 4   ? reduce_row<T, 4>
                         : images == 3 ? reduce_row<T, 3>
                         : images == 2 ? reduce_row<T, 2>
                                       : reduce_row<T, 1>;
    reduce_images(kernels + row * ld, apart, length, block.bank + row * block.row,
            block.grad ? block.grad + row * block.row : nullptr, block.expert, s.g, eta, dots, add);
    for (i64 j = 0; j < images; j++)
      for (i64 i = 0; i < s.g; i++)
        grad_eta[((image + j) * s.g + i) * per + (per == 1 ? 0 : channel + row)] += dots[j * s.g + i];
  }
}

// to[k] = sum of from[partial, k] over all partials, for k < length; added to what is there if `add`.
template <typename T>
void sum_partials(ParallelFor parallel_for, const T* from, i64 partials, i64 length, bool add, T* to) {
  parallel(parallel_for, length, 16384, [&](i64 begin, i64 end) {
    for (i64 k = begin; k < end; k++) {
      T sum = add ? to[k] : T(0);
      for (i64 partial = 0; partial < partials; partial++) sum += from[partial * length + k];
      to[k] = sum;
    }
  });
}

}  // namespace DYCONVERT_TARGET
