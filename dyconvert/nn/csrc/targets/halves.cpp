// What is compiled for AVX-512, with its vectors as two of AVX2's: for tests, which run it everywhere.
#if defined(__x86_64__)
#define DYCONVERT_TARGET dyconvert_halves
#define DYCONVERT_VECTOR 64
#define DYCONVERT_REGISTER 32
#define DYCONVERT_REGISTERS 32
#define DYCONVERT_F16C
#include "base/standard.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static int runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

extern const DyconvertTarget dyconvert_target_halves;
const DyconvertTarget dyconvert_target_halves = dyconvert_halves::target_of("avx512-halves", runs_here);
#endif
