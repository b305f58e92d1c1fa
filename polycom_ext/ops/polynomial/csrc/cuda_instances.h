// The CUDA entry points of each storage type, compiled from a file of its own (cuda_float.cu, ...).
#pragma once

#include <cuda_runtime.h>

#include "arguments.h"
#include "quantized_arguments.h"

namespace polycom {

// Gives `floats` floats of device memory that stay valid until the work on the stream is done.
using Allocate = float* (*)(void* context, int64_t floats);

// forward and backward start the work on the stream. coefficients: (experts, order + 1), written if problem.step is
// WHOLE. probe says whether the current device can run a kernel of this file.
#define POLYCOM_DECLARE_INSTANCE(NAME)                                                                    \
  namespace NAME {                                                                                        \
  cudaError_t forward(const ForwardArguments& arguments, cudaStream_t stream);                            \
  cudaError_t backward(BackwardArguments arguments, float* coefficients, Allocate allocate, void* context, \
                       cudaStream_t stream);                                                              \
  cudaError_t probe();                                                                                    \
  }

POLYCOM_DECLARE_INSTANCE(float32)
POLYCOM_DECLARE_INSTANCE(bfloat16)
POLYCOM_DECLARE_INSTANCE(float16)

// Of bfloat16 rows that a kernel holds, and order 3.
cudaError_t forward_quantized(const QuantizedArguments& arguments, cudaStream_t stream);

}  // namespace polycom
