// What a dynamic conv is asked to do. All other files use these words:
//
//   bank          the g experts' kernels, one behind the other: [g, C_out, K]
//   eta           the coefficients that mix them, one for each expert (and output channel) of each image
//   mean, scale   of a compressed bank: what its experts have in common, [C_out, K], and what each channel of each expert
//                 is multiplied with, [g, C_out]; the bank has the experts' differences from the mean then
//   mix           to make the kernel that an image is convolved with: sum_i eta[i] bank[i]
//   factors       of an image, what the elements of its mixed kernels are multiplied by, the same in all output channels
//                 of a group: [groups, K], or [1, K] for all groups; null: 1
//   tap           a place in a kernel, of kernel_height * kernel_width
//   element       a weight of one output channel's kernel: K = C_in / groups * taps of them
//   pixel         a place in the output (or, of a gradient, in what is its result)
//   plane         one channel of the input, laid out: padded, and with a stride's phases apart (`planes.h`)
//   panel         what a few vectors of pixels meet, element by element of the kernel (`panels.h`)
//   part          pixels for which the same weights meet the same elements (`parts.h`)
//   row           a row of what is multiplied: an output channel's kernel
//   tile          of the register: a few rows times a few vectors (`multiply.h`); of Winograd's filtering: 4 x 4 pixels
//   scratch       memory that what is laid out takes
//   a, lda        a matrix, and how many elements from one of its rows to the next
#pragma once
#include "base/parallel.h"

namespace DYCONVERT_TARGET {

// Filled by `native.py`, which has the same names in the same order; both have the ABI's number, in `native.cpp`.
struct Shape {
  i64 images, in_channels, height, width;
  i64 out_channels, out_height, out_width;
  i64 g, groups, kernel_height, kernel_width;
  i64 stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  i64 x_image, x_channel, x_row, x_column;      // strides of the input, in elements
  i64 out_channel, out_pixel;                   // strides of the output
  i64 bank_last;                                // 1: a kernel lies as [kH, kW, C_in], 0: as [C_in, kH, kW]
  i64 eta_image, eta_expert, eta_channel;       // strides of the coefficients; eta_channel 0: one for all
  i64 factor_groups;                            // groups with factors of their own; 1: all have the same; 0: none
  i64 threads;

  i64 taps() const { return kernel_height * kernel_width; }
  i64 group_in() const { return in_channels / groups; }
  i64 group_out() const { return out_channels / groups; }
  i64 elements() const { return group_in() * taps(); }  // of one output channel's kernel
  i64 pixels() const { return out_height * out_width; }
  // Where an output channel's kernel has its factors.
  i64 factors_at(i64 image, i64 channel) const {
    return (image * factor_groups + (factor_groups > 1 ? channel / group_out() : 0)) * elements();
  }
};
static_assert(std::is_standard_layout_v<Shape> && sizeof(Shape) == 29 * sizeof(i64), "as `native.py` has it");

// What a conv computes: its output; or the gradient of its input, from its output's.
enum class Result { kOutput, kInputGradient };

// B: the bank's type. T: everything else's.
template <typename T, typename B>
struct Problem {
  const Shape& shape;
  ParallelFor parallel_for;
  const T* x;      // [N, C_in, H, W]
  const B* bank;   // [g, C_out, K]
  const T* eta;    // [N, g, 1] or [N, g, C_out]
  const T* factors;  // [N, factor_groups, K], contiguous, or null
  const T* bias;   // [g, C_out] or null
  const T* shift;  // [C_out] or null
  T* out;          // [N, C_out, oH, oW]
  T* scratch;      // of `scratch_elements()` of what computes it
  const T* mean;   // [C_out, K], or null
  const T* scale;  // [g, C_out], or null

  // Those of an output channel's kernel; null: there are none.
  const T* factors_of(i64 image, i64 channel) const {
    return factors ? factors + shape.factors_at(image, channel) : nullptr;
  }
};

}  // namespace DYCONVERT_TARGET
