// What every target's kernels offer to `native.cpp`: functions that take addresses. No code: it is compiled for none.
#pragma once
#include <stdint.h>

// torch's own thread pool: `torch_parallel_for` of its stable C interface, which returns 0 or what failed.
using DyconvertBody = void (*)(int64_t begin, int64_t end, void* context);
using DyconvertParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, DyconvertBody body, void* context);

// Of elements, as `native.py` numbers them.
enum DyconvertType { kFloat32, kFloat64, kFloat16, kBFloat16, kInt8 };

// What is asked for: the output, or a gradient.
enum DyconvertAsked { kOutput, kInputGradient, kBankGradient };

// How it is computed, as `native.py` numbers them.
enum DyconvertPath {
  kWinograd,            // 3 x 3 by Winograd's filtering
  kPanels,              // pixels brought together, element by element of the kernel
  kPlanes,              // taps that meet a padded plane from some offset on
  kDepthwise,           // channel by channel
  kDepthwiseLast,       // channel by channel, a vector of channels at a time
  kTileProducts,        // the bank's gradient, by Winograd's filtering
  kPixelProducts,       // the bank's gradient, tap by tap
  kDepthwiseProducts,   // the bank's gradient, channel by channel
};

// What a call ends with, as `native.py` numbers them.
enum DyconvertEnd { kDone, kNoMemory, kThreadFailed, kUnknownFailure };

struct DyconvertTensors {
  const void *x, *bank, *eta, *factors, *bias, *shift, *grad;
  void *out, *grad_bank, *grad_eta, *grad_factors;
  const void *mean, *scale;  // of a compressed bank, or null
};

// A linear layer.
struct DyconvertLinear {
  const float* x;       // [images, inputs]
  const void* weights;  // [outputs, inputs]
  const float *scale, *bias;  // [outputs], or null
  float* out;           // [images, outputs]
  int64_t images, inputs, outputs;
};

struct DyconvertTarget {
  const char* name;
  int shape_bytes, vector_bytes;
  int (*runs_here)();
  DyconvertPath (*path)(const void* shape, DyconvertAsked asked, DyconvertType type);
  // asked: the output, or the input's gradient. May throw.
  void (*convolve)(const void* shape, DyconvertParallelFor, const DyconvertTensors&, DyconvertAsked asked,
                   DyconvertType type, DyconvertType bank_type);
  void (*bank_gradient)(const void* shape, DyconvertParallelFor, const DyconvertTensors&, DyconvertType type);
  void (*linear)(const DyconvertLinear&, DyconvertParallelFor, DyconvertType weight_type);
};
