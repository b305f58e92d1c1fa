// The CPU kernels, compiled once per instruction set; cpu_ops.cpp chooses among them at run time.
#pragma once

#include "arguments.h"

namespace polycom {

// Both work on rows [begin, end).
using ForwardKernel = void (*)(const ForwardArguments&, int64_t begin, int64_t end);
using BackwardKernel = void (*)(const BackwardArguments&, int64_t begin, int64_t end);

#define POLYCOM_DECLARE_KERNELS(ISA)                                           \
  namespace ISA {                                                              \
  void forward(const ForwardArguments& arguments, int64_t begin, int64_t end); \
  void backward(const BackwardArguments& arguments, int64_t begin, int64_t end); \
  }

POLYCOM_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
POLYCOM_DECLARE_KERNELS(avx2)
POLYCOM_DECLARE_KERNELS(avx512)
#endif

}  // namespace polycom
