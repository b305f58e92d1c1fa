// The CUDA implementations of the library `polycom`, whose schemas cpu_ops.cpp defines.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>
#include <vector>

#include "cuda_instances.h"
#include "operators.h"
#include "quantized_operator.h"

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

// Of libtorch_cuda, looked up where it is loaded: linked, a library built beside a CPU build of torch would lack it.
const char* const STREAM_SYMBOL = "aoti_torch_get_current_cuda_stream";

auto stream_function() {
  static const auto function = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<AOTITorchError (*)(int32_t, void**)>(
        torch_cuda ? dlsym(torch_cuda, STREAM_SYMBOL) : nullptr);
  }();
  return function;
}

cudaStream_t current_stream(const Tensor& x) {
  STD_TORCH_CHECK(stream_function(), "polycom: libtorch_cuda.so has no ", STREAM_SYMBOL);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(stream_function()(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

std::string describe(cudaError_t error, int device) {
  int driver = 0, major = 0, minor = 0;
  switch (error) {
    case cudaSuccess: return "";
    case cudaErrorInsufficientDriver:
      cudaDriverGetVersion(&driver);
      if (driver == 0) return "there is no CUDA driver";
      return "its driver serves CUDA " + version(driver) + " and _cuda.so was built with CUDA " +
             version(CUDART_VERSION) + "; install a newer driver, or build with that CUDA";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion: {
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
      const std::string capability = std::to_string(major) + "." + std::to_string(minor);
      if (major < 8) return "the kernels need compute capability 8.0, and it has " + capability;
      return "_cuda.so holds no code for compute capability " + capability + "; build it with TORCH_CUDA_ARCH_LIST=" +
             capability;
    }
    default: return cudaGetErrorString(error);
  }
}

// Why no kernel can run on the device, or nothing.
std::string cuda_problem(int64_t device) {
  if (!stream_function()) return std::string("libtorch_cuda.so has no ") + STREAM_SYMBOL;
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(int(device));
  if (error == cudaSuccess) {
    error = float32::probe();
    cudaSetDevice(before);
  }
  cudaGetLastError();  // told here, not to whoever asks next
  return describe(error, int(device));
}

std::string cuda_build() { return POLYCOM_SOURCES; }

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

  static void run(const QuantizedArguments& arguments, const Tensor& x) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    check(forward_quantized(arguments, current_stream(x)));
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

STABLE_TORCH_LIBRARY_FRAGMENT(polycom, library) {
  library.def("polynomial_cuda_build() -> str");
  library.def("polynomial_cuda_problem(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(polycom, CompositeExplicitAutograd, library) {
  library.impl("polynomial_cuda_build", TORCH_BOX(&polycom::cuda_build));
  library.impl("polynomial_cuda_problem", TORCH_BOX(&polycom::cuda_problem));
}

STABLE_TORCH_LIBRARY_IMPL(polycom, CUDA, library) {
  polycom::register_operators<polycom::Cuda>(library);
  library.impl("polynomial_quantized", TORCH_BOX(&polycom::Flat<&polycom::quantized<polycom::Cuda>>::call));
}
