// The CUDA implementations of the library `polycom`, whose schemas cpu_ops.cpp defines.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "cuda_instances.h"
#include "operators.h"

namespace polycom {
namespace {

// Scratch memory from torch's caching allocator, whose blocks are reused in stream order.
struct Scratch {
  const Tensor& like;
  std::vector<Tensor> held;

  static float* allocate(void* self, int64_t floats) {
    auto& scratch = *static_cast<Scratch*>(self);
    scratch.held.push_back(empty(scratch.like, {floats}, ScalarType::Float));
    return scratch.held.back().mutable_data_ptr<float>();
  }
};

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "polycom: ", cudaGetErrorString(error)); }

struct Cuda {
  static void run(const ForwardArguments& arguments, const Tensor& x) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const cudaStream_t stream = current_stream(x);
    switch (arguments.problem.storage) {
      case Storage::FLOAT: return check(float32::forward(arguments, stream));
      case Storage::BFLOAT16: return check(bfloat16::forward(arguments, stream));
      case Storage::HALF: return check(float16::forward(arguments, stream));
    }
  }

  static void run(const BackwardArguments& arguments, const Tensor& x, float* coefficients) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const cudaStream_t stream = current_stream(x);
    Scratch scratch{x, {}};
    const auto allocate = &Scratch::allocate;
    switch (arguments.problem.storage) {
      case Storage::FLOAT: return check(float32::backward(arguments, coefficients, allocate, &scratch, stream));
      case Storage::BFLOAT16: return check(bfloat16::backward(arguments, coefficients, allocate, &scratch, stream));
      case Storage::HALF: return check(float16::backward(arguments, coefficients, allocate, &scratch, stream));
    }
  }
};

}  // namespace
}  // namespace polycom

STABLE_TORCH_LIBRARY_IMPL(polycom, CUDA, library) { polycom::register_operators<polycom::Cuda>(library); }
