// What is compiled for AVX-512, with its vectors as two of AVX2's: for tests, which run it everywhere.
#if defined(__x86_64__)
#define DYCONVERT_TARGET dyconvert_halves
#define DYCONVERT_VECTOR 64
#define DYCONVERT_REGISTER 32
#define DYCONVERT_REGISTERS 32
#include "targets/avx2.h"

extern const DyconvertTarget dyconvert_target_halves;
const DyconvertTarget dyconvert_target_halves = dyconvert_halves::target_of("avx512-halves", runs_here);
#endif
