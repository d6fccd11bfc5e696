// The plain C functions that `native.py` calls. They use the kernels of the target that is chosen when they are loaded.
#include "interface.h"

#include <new>
#include <stdexcept>

#define DYCONVERT_EXPORT extern "C" __attribute__((visibility("default")))

// Raised when `Shape`, an enum or a function changes.
constexpr int kAbi = 5;

// The best first; the one that is only for tests last.
#if defined(__x86_64__)
extern const DyconvertTarget dyconvert_target_avx512, dyconvert_target_avx2, dyconvert_target_plain,
    dyconvert_target_halves;
static const DyconvertTarget* const kTargets[] = {&dyconvert_target_avx512, &dyconvert_target_avx2,
                                                  &dyconvert_target_plain, &dyconvert_target_halves};
#elif defined(__aarch64__)
extern const DyconvertTarget dyconvert_target_neon;
static const DyconvertTarget* const kTargets[] = {&dyconvert_target_neon};
#else
extern const DyconvertTarget dyconvert_target_plain;
static const DyconvertTarget* const kTargets[] = {&dyconvert_target_plain};
#endif
constexpr int kCount = sizeof(kTargets) / sizeof(kTargets[0]);

static const DyconvertTarget* used = nullptr;

template <typename F>
static int status_of(const F& body) {
  try {
    body();
    return kDone;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  } catch (const std::runtime_error&) {
    return kThreadFailed;
  } catch (...) {
    return kUnknownFailure;
  }
}

DYCONVERT_EXPORT int dyconvert_abi() { return kAbi; }
DYCONVERT_EXPORT int dyconvert_shape_bytes() { return kTargets[0]->shape_bytes; }

// The name of a target, or null if there are no more.
DYCONVERT_EXPORT const char* dyconvert_target_name(int number) {
  return number >= 0 && number < kCount ? kTargets[number]->name : nullptr;
}
DYCONVERT_EXPORT int dyconvert_target_runs_here(int number) { return kTargets[number]->runs_here() ? 1 : 0; }
DYCONVERT_EXPORT void dyconvert_use(int number) { used = kTargets[number]; }

DYCONVERT_EXPORT int dyconvert_path(const void* shape, int task, int type) {
  return used->path(shape, static_cast<DyconvertTask>(task), static_cast<DyconvertType>(type));
}

DYCONVERT_EXPORT int dyconvert_conv(const void* shape, DyconvertParallelFor parallel_for, const void* x,
                                    const void* bank, const void* mean, const void* scale, const void* eta,
                                    const void* factors, const void* bias, const void* shift, void* out, int type,
                                    int bank_type) {
  const DyconvertTensors tensors{x,   bank,    eta,     factors, bias, shift, nullptr,
                                 out, nullptr, nullptr, nullptr, mean, scale};
  return status_of([&] {
    used->convolve(shape, parallel_for, tensors, kOutput, static_cast<DyconvertType>(type),
                   static_cast<DyconvertType>(bank_type));
  });
}

// The gradient of the input from the gradient of the output; both are contiguous.
DYCONVERT_EXPORT int dyconvert_input_gradient(const void* shape, DyconvertParallelFor parallel_for, const void* grad,
                                              const void* bank, const void* eta, const void* factors, void* grad_x,
                                              int type) {
  const DyconvertTensors tensors{grad,   bank,    eta,     factors, nullptr, nullptr, nullptr,
                                 grad_x, nullptr, nullptr, nullptr, nullptr, nullptr};
  return status_of([&] {
    used->convolve(shape, parallel_for, tensors, kInputGradient, static_cast<DyconvertType>(type),
                   static_cast<DyconvertType>(type));
  });
}

// The gradients of the bank, the coefficients and the factors.
DYCONVERT_EXPORT int dyconvert_bank_gradient(const void* shape, DyconvertParallelFor parallel_for, const void* grad,
                                             const void* x, const void* bank, const void* eta, const void* factors,
                                             void* grad_bank, void* grad_eta, void* grad_factors, int type) {
  const DyconvertTensors tensors{x,       bank,      eta,      factors,      nullptr, nullptr, grad,
                                 nullptr, grad_bank, grad_eta, grad_factors, nullptr, nullptr};
  return status_of([&] { used->bank_gradient(shape, parallel_for, tensors, static_cast<DyconvertType>(type)); });
}

// A linear layer with weights of float32, bfloat16 or int8.
DYCONVERT_EXPORT int dyconvert_linear(DyconvertParallelFor parallel_for, const float* x, const void* weights,
                                      const float* scale, const float* bias, float* out, int64_t images, int64_t inputs,
                                      int64_t outputs, int weight_type) {
  const DyconvertLinear layer{x, weights, scale, bias, out, images, inputs, outputs};
  return status_of([&] { used->linear(layer, parallel_for, static_cast<DyconvertType>(weight_type)); });
}
