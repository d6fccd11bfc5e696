// Processors of any kind: two of the smallest vector registers there are. On x86, those without AVX2.
#if !defined(__aarch64__)
#define DYCONVERT_TARGET dyconvert_plain
#define DYCONVERT_VECTOR 32
#define DYCONVERT_REGISTER 16
#define DYCONVERT_REGISTERS 16

#include "base/standard.h"

#include "kernels.h"

static int runs_here() { return 1; }

extern const DyconvertTarget dyconvert_target_plain;
const DyconvertTarget dyconvert_target_plain = dyconvert_plain::target_of("plain", runs_here);
#endif
