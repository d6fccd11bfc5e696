// The functions that every target offers to `native.cpp`. There is no code here, for it would be compiled for no
// target.
#pragma once
#include <stdint.h>

// torch's own thread pool: `torch_parallel_for` of its stable C interface. It returns 0, or another number if it
// failed.
using DyconvertBody = void (*)(int64_t begin, int64_t end, void* context);
using DyconvertParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, DyconvertBody body, void* context);

// Types of elements, as `native.py` numbers them.
enum DyconvertType { kFloat32, kFloat64, kFloat16, kBFloat16, kInt8 };

// What a call computes, as `native_library.py` numbers it: the output, or a gradient.
enum DyconvertTask { kOutput, kInputGradient, kBankGradient };

// Which kernel computes it, as `native_library.py` numbers them.
enum DyconvertPath {
  kWinograd,            // 3 x 3, by Winograd's filtering
  kPanels,              // vectors of pixels gathered, one element of the kernel after the other
  kPlanes,              // taps that read a padded plane from some offset on
  kDepthwise,           // channel by channel
  kDepthwiseLast,       // channel by channel, a vector of channels at a time
  kTileProducts,        // the bank's gradient, by Winograd's filtering
  kPixelProducts,       // the bank's gradient, tap by tap
  kDepthwiseProducts,   // the bank's gradient, channel by channel
  kChannels,            // pixels broadcast to vectors of output channels
};

// What a call returns, as `native.py` numbers it.
enum DyconvertStatus { kDone, kNoMemory, kThreadFailed, kUnknownFailure };

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
  DyconvertPath (*path)(const void* shape, DyconvertTask task, DyconvertType type);
  // task: the output, or the input's gradient. May throw.
  void (*convolve)(const void* shape, DyconvertParallelFor, const DyconvertTensors&, DyconvertTask task,
                   DyconvertType type, DyconvertType bank_type);
  void (*bank_gradient)(const void* shape, DyconvertParallelFor, const DyconvertTensors&, DyconvertType type);
  void (*linear)(const DyconvertLinear&, DyconvertParallelFor, DyconvertType weight_type);
};
