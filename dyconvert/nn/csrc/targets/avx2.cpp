// x86 since 2013.
#if defined(__x86_64__)
#define DYCONVERT_TARGET dyconvert_avx2
#define DYCONVERT_VECTOR 32
#define DYCONVERT_REGISTER 32
#define DYCONVERT_REGISTERS 16
#include "targets/avx2.h"

extern const DyconvertTarget dyconvert_target_avx2;
const DyconvertTarget dyconvert_target_avx2 = dyconvert_avx2::target_of("avx2", runs_here);
#endif
