// Dynamic convs on a CPU, called by `native.py` through the plain C functions at the end of this file.
#include "conv.h"
#include "depthwise.h"

namespace {

using namespace dyconvert;

template <typename T, typename B>
Problem<T, B> problem_of(const Shape& shape, void* const* pointers) {
  return {shape,
          reinterpret_cast<ParallelFor>(pointers[0]),
          static_cast<const T*>(pointers[1]),
          static_cast<const B*>(pointers[2]),
          static_cast<const T*>(pointers[3]),
          static_cast<const B*>(pointers[4]),
          static_cast<const T*>(pointers[5]),
          static_cast<T*>(pointers[6]),
          nullptr};
}

template <typename T, typename B, template <typename> class Layout>
void run(Conv<T, B, Layout> conv, Problem<T, B>& problem) {
  static thread_local Buffer<T> scratch;
  problem.scratch = scratch.of(conv.scratch_elements());
  conv.run();
}

template <typename T, typename B>
void convolve(const Shape& shape, void* const* pointers) {
  Problem<T, B> problem = problem_of<T, B>(shape, pointers);
  if (shape.group_in() == 1)
    Depthwise<T, B>(problem).run();
  else if (shape.taps() == 1 && !shape.padding_y && !shape.padding_x)
    run(Conv<T, B, Panels>(problem), problem);
  else
    run(Conv<T, B, Planes>(problem), problem);
}

enum Type { kFloat32, kFloat64, kFloat16, kBFloat16 };  // as `native.py` numbers them

}  // namespace

// Returns 0, or 1 if there was no memory.
extern "C" int dyconvert_conv(const Shape* shape, void* const* pointers, int dtype, int bank_dtype) try {
  if (dtype == kFloat64)
    convolve<double, double>(*shape, pointers);
  else if (bank_dtype == kFloat16)
    convolve<float, Float16>(*shape, pointers);
  else if (bank_dtype == kBFloat16)
    convolve<float, BFloat16>(*shape, pointers);
  else
    convolve<float, float>(*shape, pointers);
  return 0;
} catch (...) {
  return 1;
}
