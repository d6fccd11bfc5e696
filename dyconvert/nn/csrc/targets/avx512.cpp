// x86 with 32 registers of 64 bytes.
#if defined(__x86_64__)
#define DYCONVERT_TARGET dyconvert_avx512
#define DYCONVERT_VECTOR 64
#define DYCONVERT_REGISTER 64
#define DYCONVERT_REGISTERS 32
#define DYCONVERT_F16C
#define DYCONVERT_AVX512
#include "base/standard.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl")
#endif
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static int runs_here() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"); }

extern const DyconvertTarget dyconvert_target_avx512;
const DyconvertTarget dyconvert_target_avx512 = dyconvert_avx512::target_of("avx512", runs_here);
#endif
