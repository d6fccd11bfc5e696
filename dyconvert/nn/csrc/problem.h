// What a dynamic conv is asked to do.
#pragma once
#include "vector.h"

namespace dyconvert {

// Filled by `native.py`, field by field.
struct Shape {
  i64 images, in_channels, height, width;
  i64 out_channels, out_height, out_width;
  i64 g, groups, kernel_height, kernel_width;
  i64 stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  i64 x_image, x_channel, x_row, x_column;                // strides of the input, in elements
  i64 out_channel, out_pixel;                             // strides of the output
  i64 bank_last;                                          // 1: a kernel lies as [kH, kW, C_in], 0: as [C_in, kH, kW]
  i64 eta_image, eta_expert, eta_channel;                 // strides of the coefficients; eta_channel 0: one for all
  i64 threads;

  i64 taps() const { return kernel_height * kernel_width; }
  i64 group_in() const { return in_channels / groups; }
  i64 group_out() const { return out_channels / groups; }
  i64 elements() const { return group_in() * taps(); }  // of one output channel's kernel
  i64 pixels() const { return out_height * out_width; }
};

// B: the bank's type. T: everything else's.
template <typename T, typename B>
struct Problem {
  const Shape& shape;
  ParallelFor parallel_for;
  const T* x;      // [N, C_in, H, W]
  const B* bank;   // [g, C_out, K]
  const T* eta;    // [N, g, 1] or [N, g, C_out]
  const B* bias;   // [g, C_out] or null
  const T* shift;  // [C_out] or null
  T* out;          // [N, C_out, oH, oW]
  T* scratch;      // of `scratch_elements()` of what computes it
};

}  // namespace dyconvert
