// Headers of the standard library and the compiler. They are included before a target's instructions are allowed:
// functions of the standard library are shared by all targets, and must run on every processor.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "interface.h"
