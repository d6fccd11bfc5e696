// 64-bit Arm: two of NEON's registers.
#if defined(__aarch64__)
#define DYCONVERT_TARGET dyconvert_neon
#define DYCONVERT_VECTOR 32
#define DYCONVERT_REGISTER 16
#define DYCONVERT_REGISTERS 32

#include "base/standard.h"

#include "kernels.h"

static int runs_here() { return 1; }

extern const DyconvertTarget dyconvert_target_neon;
const DyconvertTarget dyconvert_target_neon = dyconvert_neon::target_of("neon", runs_here);
#endif
