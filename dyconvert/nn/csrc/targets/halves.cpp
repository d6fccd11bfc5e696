// The kernels as they are compiled for AVX-512, but with a vector as two of AVX2's registers: so tests run them on any
// x86 with AVX2.
#if defined(__x86_64__)
#define DYCONVERT_TARGET dyconvert_halves
#define DYCONVERT_VECTOR 64
#define DYCONVERT_REGISTER 32
#define DYCONVERT_REGISTERS 32
#include "targets/avx2.h"

extern const DyconvertTarget dyconvert_target_halves;
const DyconvertTarget dyconvert_target_halves = dyconvert_halves::target_of("avx512-halves", runs_here);
#endif
