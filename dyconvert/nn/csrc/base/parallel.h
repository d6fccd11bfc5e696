// Memory that a thread keeps from call to call, and loops on torch's own threads.
#pragma once
#include "base/vector.h"
#include "interface.h"

namespace DYCONVERT_TARGET {

// Memory that a thread keeps from call to call: touching fresh memory of the system takes longer than computing with
// it.
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

// Where a conv or a gradient lays out its input. A thread computes one after the other, so all share it.
template <typename T>
Buffer<T>& scratch() {
  static thread_local Buffer<T> buffer;
  return buffer;
}

using ParallelFor = DyconvertParallelFor;

// The fewest pieces of work for one thread, if a piece takes so many multiplications: waking a thread takes as long as
// some ten thousand of them.
inline i64 grain_of(i64 multiplications) { return max<i64>(1, 65536 / max<i64>(1, multiplications)); }

// Channels of the result in one block: at most `most`, blocks of about one size, and as many blocks as the threads can
// share evenly. others: the number of pieces that each block is split into besides.
inline i64 rows_together(i64 channels, i64 most, i64 others, i64 threads) {
  i64 blocks = divided_up(channels, most);
  const auto idle = [&] { return rounded_up(blocks * others, threads) - blocks * others; };
  while (idle() * 8 > blocks * others && blocks * 4 < channels) blocks++;
  return min(channels, rounded_up(divided_up(channels, blocks), 4));
}

// Calls body(begin, end) for ranges that make up [0, count), on torch's threads. Throws if a thread fails.
template <typename F>
void parallel(ParallelFor parallel_for, i64 count, i64 grain, const F& body) {
  struct Context {
    const F& body;
    bool no_memory;
  } context{body, false};
  const int32_t failed = parallel_for(
      0, count, grain,
      [](i64 begin, i64 end, void* at) {
        auto* context = static_cast<Context*>(at);
        try {
          context->body(begin, end);
        } catch (const std::bad_alloc&) {
          __atomic_store_n(&context->no_memory, true, __ATOMIC_RELAXED);
        }
      },
      &context);
  if (context.no_memory) throw std::bad_alloc();
  if (failed) throw std::runtime_error("a thread of torch's pool failed");
}

}  // namespace DYCONVERT_TARGET
