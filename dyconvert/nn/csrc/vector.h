// Vectors of 32 bytes in the notation that GCC and Clang share, and what the rest is written with.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <vector>

namespace dyconvert {

using i64 = int64_t;
using std::max;
using std::min;

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(32)));
  typedef float unaligned __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(32)));
  typedef double unaligned __attribute__((vector_size(32), aligned(8), may_alias));
};

template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
using Unaligned = typename VectorOf<T>::unaligned;
// What a vector is made of.
template <typename V>
using Element = std::remove_reference_t<decltype(V{}[0])>;
// Elements of a vector.
template <typename T>
constexpr i64 kLanes = 32 / sizeof(T);

// The elements of two vectors with these numbers, those of the second after those of the first.
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

template <typename T>
inline Vector<T> load(const T* at) {
  return (Vector<T>)*reinterpret_cast<const Unaligned<T>*>(at);
}
template <typename T>
inline void store(T* at, Vector<T> value) {
  *reinterpret_cast<Unaligned<T>*>(at) = value;
}

inline i64 divided_up(i64 a, i64 b) { return (a + b - 1) / b; }
inline i64 rounded_up(i64 a, i64 b) { return divided_up(a, b) * b; }

// Memory that a thread keeps from call to call: fresh memory from the system costs more to touch than to compute with.
template <typename T>
class Buffer {
 public:
  ~Buffer() { free(at_); }
  T* of(i64 elements) {
    if (elements > size_) {
      free(at_);
      size_ = 0;
      at_ = static_cast<T*>(aligned_alloc(64, rounded_up(elements * sizeof(T), 64)));
      if (!at_) throw std::bad_alloc();
      size_ = elements;
    }
    return at_;
  }

 private:
  T* at_ = nullptr;
  i64 size_ = 0;
};

// Where a conv, or a gradient, lays out its input: one for whatever a thread computes, one after the other.
template <typename T>
Buffer<T>& scratch() {
  static thread_local Buffer<T> buffer;
  return buffer;
}

// torch's own thread pool: `torch_parallel_for` of its stable C interface, which returns 0 or what failed.
using Body = void (*)(i64 begin, i64 end, void* context);
using ParallelFor = int32_t (*)(i64 begin, i64 end, i64 grain, Body body, void* context);

// How many pieces of work a thread is to take at least, each of so many multiplications: waking a thread takes as long
// as some ten thousands.
inline i64 grain_of(i64 multiplications) { return max<i64>(1, 65536 / max<i64>(1, multiplications)); }

// Channels of the result in blocks of at most so many, of one size as far as possible, and as many as the threads can
// share evenly. others: into how many pieces the work is split besides.
inline i64 rows_together(i64 channels, i64 most, i64 others, i64 threads) {
  i64 blocks = divided_up(channels, most);
  const auto idle = [&] { return rounded_up(blocks * others, threads) - blocks * others; };
  while (idle() * 8 > blocks * others && blocks * 4 < channels) blocks++;
  return min(channels, rounded_up(divided_up(channels, blocks), 4));
}

template <typename F>
void parallel(ParallelFor parallel_for, i64 count, i64 grain, const F& body) {
  const int32_t failed = parallel_for(
      0, count, grain, [](i64 begin, i64 end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&body));
  if (failed) throw std::runtime_error("a thread failed");
}

}  // namespace dyconvert
