// Elements of a bank: of the type that is computed in, or of half precision, which is half as much to read.
#pragma once
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "vector.h"

namespace dyconvert {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
inline Vector<T> load_as(const T* at) {
  return load(at);
}

template <typename T>
inline T value_of(T element) {
  return element;
}

inline float value_of(BFloat16 element) {
  uint32_t bits = static_cast<uint32_t>(element.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline float value_of(Float16 element) {
#ifdef __F16C__
  return _cvtsh_ss(element.bits);
#else
  _Float16 value;
  memcpy(&value, &element.bits, sizeof value);
  return static_cast<float>(value);
#endif
}

template <typename T>
inline Vector<T> load_as(const BFloat16* at) {
  typedef uint16_t Halves __attribute__((vector_size(16), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(32)));
  return (Vector<T>)(__builtin_convertvector(*reinterpret_cast<const Halves*>(at), Words) << 16);
}

template <typename T>
inline Vector<T> load_as(const Float16* at) {
#ifdef __F16C__
  return (Vector<T>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#else
  typedef _Float16 Halves __attribute__((vector_size(16), aligned(2), may_alias));
  return (Vector<T>)__builtin_convertvector(*reinterpret_cast<const Halves*>(at), Vector<float>);
#endif
}

}  // namespace dyconvert
