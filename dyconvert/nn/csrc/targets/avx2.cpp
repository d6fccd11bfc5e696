// x86 since 2013.
#if defined(__x86_64__)
#define DYCONVERT_TARGET dyconvert_avx2
#define DYCONVERT_VECTOR 32
#define DYCONVERT_REGISTER 32
#define DYCONVERT_REGISTERS 16
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

extern const DyconvertTarget dyconvert_target_avx2;
const DyconvertTarget dyconvert_target_avx2 = dyconvert_avx2::target_of("avx2", runs_here);
#endif
