// Elements of a bank: of the type that kernels compute in, or of fewer bits, so that less is read.
#pragma once
#include "base/vector.h"

namespace DYCONVERT_TARGET {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Int8 {
  int8_t number;
};

template <typename T>
inline Vector<T> load_as(const T* at) {
  return load(at);
}

template <typename T>
inline T value_of(T element) {
  return element;
}

inline float value_of(Int8 element) { return element.number; }

inline float value_of(BFloat16 element) {
  uint32_t bits = static_cast<uint32_t>(element.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline float value_of(Float16 element) {
#if defined(DYCONVERT_F16C)
  return _cvtsh_ss(element.bits);
#elif defined(__aarch64__)
  __fp16 value;
  memcpy(&value, &element.bits, sizeof value);
  return value;
#else
  // The exponent's bias differs by 112; above float16's largest number are infinity and NaN.
  const uint32_t magnitude = element.bits & 0x7fff, sign = uint32_t(element.bits & 0x8000) << 16;
  uint32_t bits = magnitude << 13;
  float value;
  memcpy(&value, &bits, sizeof value);
  value *= 0x1p112f;
  memcpy(&bits, &value, sizeof bits);
  if (magnitude >= 0x7c00) bits |= 0x7f800000;
  bits |= sign;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// Loads a register of float32 from as many elements of fewer bits.
template <int count>
inline Register<float, count> widened(const BFloat16* at) {
  using Words = Register<uint32_t, count>;
  const auto halves = load_register<uint16_t, count>(&at->bits);
  return (Register<float, count>)(__builtin_convertvector(halves, Words) << 16);
}

template <int count>
inline Register<float, count> widened(const Int8* at) {
#if defined(DYCONVERT_AVX512)
  if constexpr (count == 16)
    return (Register<float, count>)_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#endif
#if defined(DYCONVERT_F16C)
  if constexpr (count == 8)
    return (Register<float, count>)_mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
#endif
  const auto numbers = load_register<int8_t, count>(&at->number);
  return __builtin_convertvector(__builtin_convertvector(numbers, Register<int32_t, count>), Register<float, count>);
}

template <int count>
inline Register<float, count> widened(const Float16* at) {
#if defined(DYCONVERT_AVX512)
  if constexpr (count == 16)
    return (Register<float, count>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#endif
#if defined(DYCONVERT_F16C)
  if constexpr (count == 8)
    return (Register<float, count>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#endif
  alignas(64) float values[count];
  for (int i = 0; i < count; i++) values[i] = value_of(at[i]);
  return load_register<float, count>(values);
}

template <typename T, typename B>
inline Vector<T> load_widened(const B* at) {
  static_assert(std::is_same_v<T, float>, "fewer bits are widened to float32");
  if constexpr (kHalves)
    return {widened<kRegister<T>>(at), widened<kRegister<T>>(at + kRegister<T>)};
  else
    return widened<kLanes<T>>(at);
}

template <typename T>
inline Vector<T> load_as(const BFloat16* at) {
  return load_widened<T>(at);
}
template <typename T>
inline Vector<T> load_as(const Float16* at) {
  return load_widened<T>(at);
}
template <typename T>
inline Vector<T> load_as(const Int8* at) {
  return load_widened<T>(at);
}

}  // namespace DYCONVERT_TARGET
