// Dynamic convs on a CPU, called by `native.py` through the plain C functions at the end of this file.
#include "bank_gradient.h"
#include "conv.h"
#include "depthwise.h"
#include "depthwise_bank_gradient.h"

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

template <typename T, typename B, template <typename> class Layout, bool gradient>
void run(Conv<T, B, Layout, gradient> conv, Problem<T, B>& problem) {
  static thread_local Buffer<T> scratch;
  problem.scratch = scratch.of(conv.scratch_elements());
  conv.run();
}

// Whether it pays to bring together what a vector of pixels meets: for output channels enough, and where phases of a
// stride of channels enough would lie in too many pages.
bool in_panels(const Shape& s, bool gradient) {
  if (s.taps() == 1 && !s.padding_y && !s.padding_x) return true;
  return !gradient && s.stride_y * s.stride_x > 1 && s.group_in() >= 16 && s.group_out() >= 48;
}

template <typename T, typename B, bool gradient>
void convolve(Problem<T, B> problem) {
  const Shape& s = problem.shape;
  if (s.group_in() == 1)
    Depthwise<T, B, gradient>(problem).run();
  else if (in_panels(s, gradient))
    run(Conv<T, B, Panels, gradient>(problem), problem);
  else
    run(Conv<T, B, Planes, gradient>(problem), problem);
}

template <typename T>
void bank_gradient(const Shape& shape, void* const* pointers) {
  const Gradients<T> to{shape,
                        reinterpret_cast<ParallelFor>(pointers[0]),
                        static_cast<const T*>(pointers[1]),
                        static_cast<const T*>(pointers[2]),
                        static_cast<const T*>(pointers[3]),
                        static_cast<const T*>(pointers[4]),
                        static_cast<T*>(pointers[5]),
                        static_cast<T*>(pointers[6])};
  if (shape.group_in() == 1)
    DepthwiseBankGradient<T>(to).run();
  else
    BankGradient<T>(to).run();
}

enum Type { kFloat32, kFloat64, kFloat16, kBFloat16 };  // as `native.py` numbers them

}  // namespace

// All return 0, or 1 if there was no memory.
#define DYCONVERT_CALL(...)     \
  try {                         \
    __VA_ARGS__;                \
    return 0;                   \
  } catch (...) {               \
    return 1;                   \
  }

extern "C" {

int dyconvert_conv(const Shape* shape, void* const* pointers, int dtype, int bank_dtype) {
  DYCONVERT_CALL(if (dtype == kFloat64) convolve<double, double, false>(problem_of<double, double>(*shape, pointers));
                 else if (bank_dtype == kFloat16) convolve<float, Float16, false>(problem_of<float, Float16>(*shape, pointers));
                 else if (bank_dtype == kBFloat16) convolve<float, BFloat16, false>(problem_of<float, BFloat16>(*shape, pointers));
                 else convolve<float, float, false>(problem_of<float, float>(*shape, pointers)))
}

// The gradient of the input: the problem's x is the output's gradient, its out the input's, both contiguous.
int dyconvert_input_gradient(const Shape* shape, void* const* pointers, int dtype) {
  DYCONVERT_CALL(if (dtype == kFloat64) convolve<double, double, true>(problem_of<double, double>(*shape, pointers));
                 else convolve<float, float, true>(problem_of<float, float>(*shape, pointers)))
}

// The gradients of the bank and the coefficients, from the output's, the input, the bank and the coefficients.
int dyconvert_bank_gradient(const Shape* shape, void* const* pointers, int dtype) {
  DYCONVERT_CALL(dtype == kFloat64 ? bank_gradient<double>(*shape, pointers) : bank_gradient<float>(*shape, pointers))
}
}
