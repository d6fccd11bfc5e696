// Dynamic convs on a CPU, called by `native.py` through the plain C functions at the end of this file.
#include "bank_gradient.h"
#include "conv.h"
#include "depthwise.h"
#include "depthwise_bank_gradient.h"
#include "depthwise_last.h"
#include "winograd_conv.h"

namespace {

using namespace dyconvert;

// Tensors by their addresses.
struct Tensors {
  const void *x, *bank, *eta, *bias, *shift;
  void* out;
};

template <typename Kind, typename T, typename B>
void run(Problem<T, B>& problem) {
  Kind conv(problem);
  problem.scratch = scratch<T>().of(conv.scratch_elements());
  conv.run();
}

// Whether it pays to bring together what a vector of pixels meets: for output channels enough, and where phases of a
// stride of channels enough would lie in too many pages.
bool in_panels(const Shape& s, bool gradient) {
  if (s.taps() == 1 && !s.padding_y && !s.padding_x) return true;
  return !gradient && s.stride_y * s.stride_x > 1 && s.group_in() >= 16 && s.group_out() >= 48;
}

template <typename T, typename B, bool gradient>
void convolve(const Shape& s, ParallelFor parallel_for, const Tensors& t) {
  Problem<T, B> problem{s,
                        parallel_for,
                        static_cast<const T*>(t.x),
                        static_cast<const B*>(t.bank),
                        static_cast<const T*>(t.eta),
                        static_cast<const B*>(t.bias),
                        static_cast<const T*>(t.shift),
                        static_cast<T*>(t.out),
                        nullptr};
  if (!gradient && DepthwiseLast<T, B>::takes(s))
    DepthwiseLast<T, B>(problem).run();
  else if (s.group_in() == 1)
    Depthwise<T, B, gradient>(problem).run();
  else if (winograd_pays<T>(s))
    run<WinogradConv<T, B, gradient>>(problem);
  else if (in_panels(s, gradient))
    run<Conv<T, B, Panels, gradient>>(problem);
  else
    run<Conv<T, B, Planes, gradient>>(problem);
}

template <typename T>
void bank_gradient(const Shape& shape, ParallelFor parallel_for, const void* grad, const Tensors& t, void* grad_bank,
                   void* grad_eta) {
  const Gradients<T> to{shape,
                        parallel_for,
                        static_cast<const T*>(grad),
                        static_cast<const T*>(t.x),
                        static_cast<const T*>(t.bank),
                        static_cast<const T*>(t.eta),
                        static_cast<T*>(grad_bank),
                        static_cast<T*>(grad_eta)};
  if (shape.group_in() == 1)
    DepthwiseBankGradient<T>(to).run();
  else if (winograd_pays<T>(shape))
    BankGradient<T, TileProducts>(to).run();
  else
    BankGradient<T, PixelProducts>(to).run();
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

int dyconvert_conv(const Shape* shape, ParallelFor parallel_for, const void* x, const void* bank, const void* eta,
                   const void* bias, const void* shift, void* out, int dtype, int bank_dtype) {
  const Tensors tensors{x, bank, eta, bias, shift, out};
  DYCONVERT_CALL(if (dtype == kFloat64) convolve<double, double, false>(*shape, parallel_for, tensors);
                 else if (bank_dtype == kFloat16) convolve<float, Float16, false>(*shape, parallel_for, tensors);
                 else if (bank_dtype == kBFloat16) convolve<float, BFloat16, false>(*shape, parallel_for, tensors);
                 else convolve<float, float, false>(*shape, parallel_for, tensors))
}

// The gradient of the input, from the output's; both contiguous.
int dyconvert_input_gradient(const Shape* shape, ParallelFor parallel_for, const void* grad, const void* bank,
                             const void* eta, void* grad_x, int dtype) {
  const Tensors tensors{grad, bank, eta, nullptr, nullptr, grad_x};
  DYCONVERT_CALL(if (dtype == kFloat64) convolve<double, double, true>(*shape, parallel_for, tensors);
                 else convolve<float, float, true>(*shape, parallel_for, tensors))
}

// The gradients of the bank and the coefficients, from the output's, the input, the bank and the coefficients.
int dyconvert_bank_gradient(const Shape* shape, ParallelFor parallel_for, const void* grad, const void* x,
                            const void* bank, const void* eta, void* grad_bank, void* grad_eta, int dtype) {
  const Tensors tensors{x, bank, eta, nullptr, nullptr, nullptr};
  DYCONVERT_CALL(dtype == kFloat64 ? bank_gradient<double>(*shape, parallel_for, grad, tensors, grad_bank, grad_eta)
                                   : bank_gradient<float>(*shape, parallel_for, grad, tensors, grad_bank, grad_eta))
}
}
