// The arguments of a dynamic conv. All files use these words, each with one meaning:
//
//   bank          the g experts' kernels, one behind the other: [g, C_out, K]
//   eta           the coefficients that mix them, one for each expert (and output channel) of each image
//   mean, scale   of a compressed bank, which holds the experts' differences from their mean: the mean, [C_out, K], and
//                 the factor of each output channel of each expert, [g, C_out]
//   mix           compute the kernel that an image is convolved with: sum_i eta[i] bank[i]
//   factors       of an image: the elements of its mixed kernels are multiplied by them, [groups, K], or [1, K] if all
//                 groups share them; null: 1
//   group         of the conv: group_in input channels and group_out output channels
//   tap           a place in a kernel: one of kernel_height * kernel_width
//   element       a weight of one output channel's kernel: it has K = group_in * taps of them
//   row           in a product, an output channel's kernel; elsewhere, a row of a map
//   pixel         a place in the output; in the input's gradient, a place in the input
//   lane          an element of a vector
//   task          output, input's gradient or bank's gradient (`interface.h`); `conv_shape`: the conv that computes it
//   phase         the pixels whose row and column leave one remainder by the stride; all of them read their input
//                 through the same taps (`phases.h`)
//   plane         one channel of the input as it is laid out: padded, and its phases one behind the other (`planes.h`)
//   field, column a phase, and a column of taps, as depthwise convs take them (`depthwise/columns.h`)
//   microtile     a few rows times a few vectors, with all sums in registers (`multiply.h`)
//   panel         the vectors that a microtile multiplies, packed one element of the kernel after the other. Its lanes
//                 are pixels (`direct/panels.h`), tiles (TilePanel) or input channels (channel panels)
//   tile          of Winograd's filtering: 4 x 4 pixels of the result
//   block         the output channels (in depthwise convs, the input channels) that one piece of work computes
//   range         the images, or the input channels, that one piece of work sums over
//   run           neighbouring elements
//   scratch       memory for planes and panels
//   a, lda        a matrix, and the number of elements from one of its rows to the next
//   apart         the number of elements from one to the next
//   together      how many are taken at a time
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
  // Where the factors of an output channel's kernel start.
  i64 factors_at(i64 image, i64 channel) const {
    return (image * factor_groups + (factor_groups > 1 ? channel / group_out() : 0)) * elements();
  }
};
static_assert(std::is_standard_layout_v<Shape> && sizeof(Shape) == 29 * sizeof(i64), "as `native.py` has it");

using Task = DyconvertTask;

// B: the type of the bank's elements. T: the type of all others.
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
  T* scratch;      // as many elements as the kernel's `scratch_elements()` says
  const T* mean;   // [C_out, K], or null
  const T* scale;  // [g, C_out], or null

  // The factors of an output channel's kernel; null: there are none.
  const T* factors_of(i64 image, i64 channel) const {
    return factors ? factors + shape.factors_at(image, channel) : nullptr;
  }
};

}  // namespace DYCONVERT_TARGET
