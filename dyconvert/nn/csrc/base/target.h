// What a target is: the instructions that one compilation of the kernels may use. `targets/*.cpp` define it, one each.
//
//   DYCONVERT_TARGET       the namespace of all code that is compiled for it: no two targets share a function
//   DYCONVERT_VECTOR       bytes of a vector, in which the kernels are written: 32 or 64
//   DYCONVERT_REGISTER     bytes of a register: a vector is one register, or two, its halves
//   DYCONVERT_REGISTERS    how many registers there are
//   DYCONVERT_F16C, DYCONVERT_AVX512: further instructions
#pragma once
#include "base/standard.h"

static_assert(DYCONVERT_VECTOR == DYCONVERT_REGISTER || DYCONVERT_VECTOR == 2 * DYCONVERT_REGISTER,
              "a vector is a register, or two");
static_assert(DYCONVERT_VECTOR == 32 || DYCONVERT_VECTOR == 64, "the kernels are written for these");
