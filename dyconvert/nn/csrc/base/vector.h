// Vectors, in the notation that GCC and Clang share. A vector has as many bytes as the target says; where the target's
// registers are smaller, a vector is two of them.
#pragma once
#include "base/target.h"

namespace DYCONVERT_TARGET {

using i64 = int64_t;
using std::max;
using std::min;

// A few elements in one register, or in some lanes of one.
template <typename T, int count>
struct RegisterOf {
  typedef T type __attribute__((vector_size(count * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(count * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <typename T, int count>
using Register = typename RegisterOf<T, count>::type;

// The type of a vector's elements.
template <typename V>
using Element = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V>()[0])>>;

// A vector of two registers.
template <typename V>
struct Halves {
  V low, high;
  static constexpr int half = sizeof(V) / sizeof(Element<V>);

  Element<V> operator[](i64 i) const { return i < half ? low[i] : high[i - half]; }

#define DYCONVERT_OPERATOR(op)                                                                                \
  friend inline __attribute__((always_inline)) Halves operator op(const Halves& a, const Halves& b) {         \
    return {a.low op b.low, a.high op b.high};                                                                \
  }                                                                                                           \
  friend inline __attribute__((always_inline)) Halves operator op(const Halves& a, Element<V> b) {            \
    return {a.low op b, a.high op b};                                                                         \
  }                                                                                                           \
  friend inline __attribute__((always_inline)) Halves operator op(Element<V> a, const Halves& b) {            \
    return {a op b.low, a op b.high};                                                                         \
  }
  DYCONVERT_OPERATOR(+)
  DYCONVERT_OPERATOR(-)
  DYCONVERT_OPERATOR(*)
#undef DYCONVERT_OPERATOR
  inline __attribute__((always_inline)) Halves& operator+=(const Halves& other) {
    low += other.low;
    high += other.high;
    return *this;
  }
};

// Whether a vector is two registers.
constexpr bool kHalves = DYCONVERT_VECTOR != DYCONVERT_REGISTER;
// Elements of a vector, and of a register.
template <typename T>
constexpr i64 kLanes = DYCONVERT_VECTOR / sizeof(T);
template <typename T>
constexpr i64 kRegister = DYCONVERT_REGISTER / sizeof(T);

template <typename T>
using Vector = std::conditional_t<kHalves, Halves<Register<T, kRegister<T>>>, Register<T, kRegister<T>>>;

template <typename T, int count>
inline Register<T, count> load_register(const T* at) {
  return (Register<T, count>)*reinterpret_cast<const typename RegisterOf<T, count>::unaligned*>(at);
}
template <typename T, int count>
inline void store_register(T* at, Register<T, count> value) {
  *reinterpret_cast<typename RegisterOf<T, count>::unaligned*>(at) = value;
}

template <typename T>
inline __attribute__((always_inline)) Vector<T> load(const T* at) {
  if constexpr (kHalves)
    return {load_register<T, kRegister<T>>(at), load_register<T, kRegister<T>>(at + kRegister<T>)};
  else
    return load_register<T, kLanes<T>>(at);
}
template <typename T>
inline __attribute__((always_inline)) void store(T* at, Vector<T> value) {
  if constexpr (kHalves) {
    store_register<T, kRegister<T>>(at, value.low);
    store_register<T, kRegister<T>>(at + kRegister<T>, value.high);
  } else {
    store_register<T, kLanes<T>>(at, value);
  }
}

// An element in all lanes.
template <typename T>
inline Vector<T> broadcast(T element) {
  return element - Vector<T>{};
}

template <typename T>
inline T sum_of(Vector<T> value) {
  T sum = 0;
  for (i64 lane = 0; lane < kLanes<T>; lane++) sum += value[lane];
  return sum;
}

// A register's bits as integers, to be masked.
template <typename V>
using Bits = decltype(V{} == V{});
template <typename V>
inline V bitwise_and(V a, V b) {
  return (V)((Bits<V>)a & (Bits<V>)b);
}
template <typename V>
inline Halves<V> bitwise_and(Halves<V> a, Halves<V> b) {
  return {bitwise_and(a.low, b.low), bitwise_and(a.high, b.high)};
}

// A mask: all bits set in lanes [first, end), none in others.
template <typename T>
inline Vector<T> window(i64 first, i64 end) {
  constexpr i64 n = kLanes<T>;
  struct Table {
    alignas(64) unsigned char bytes[3 * n * sizeof(T)] = {};
    constexpr Table() {
      for (i64 i = n * sizeof(T); i < i64(2 * n * sizeof(T)); i++) bytes[i] = 0xff;
    }
  };
  static constexpr Table table;
  const T* lanes = reinterpret_cast<const T*>(table.bytes);
  return bitwise_and(load(lanes + n - first), load(lanes + 2 * n - end));
}

// Elements of two registers by their numbers; those of b are numbered after those of a.
template <int... numbers, typename V>
inline V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, numbers...);
#else
  typedef std::conditional_t<sizeof(Element<V>) == 4, int32_t, i64> Number;
  typedef Number Numbers __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Numbers{numbers...});
#endif
}

template <int offset, typename V, size_t... i>
inline V every_other(V a, V b, std::index_sequence<i...>) {
  return shuffle<(2 * int(i) + offset)...>(a, b);
}
template <typename V>
constexpr auto kNumbers = std::make_index_sequence<sizeof(V) / sizeof(Element<V>)>{};

// evens: elements 0, 2 ... of two vectors, a's before b's; odds: elements 1, 3 ... .
template <typename V>
inline V evens(V a, V b) {
  return every_other<0>(a, b, kNumbers<V>);
}
template <typename V>
inline V odds(V a, V b) {
  return every_other<1>(a, b, kNumbers<V>);
}
template <typename V>
inline Halves<V> evens(Halves<V> a, Halves<V> b) {
  return {evens(a.low, a.high), evens(b.low, b.high)};
}
template <typename V>
inline Halves<V> odds(Halves<V> a, Halves<V> b) {
  return {odds(a.low, a.high), odds(b.low, b.high)};
}

inline i64 divided_up(i64 a, i64 b) { return (a + b - 1) / b; }
inline i64 rounded_up(i64 a, i64 b) { return divided_up(a, b) * b; }

}  // namespace DYCONVERT_TARGET
