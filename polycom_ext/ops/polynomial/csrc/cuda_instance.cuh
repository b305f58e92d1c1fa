// Body of cuda_float.cu and its siblings, which define POLYCOM_STORAGE and POLYCOM_INSTANCE.
#include "cuda_instances.h"
#include "cuda_launch.cuh"

namespace polycom {
namespace {

constexpr int WITHOUT_ASKING = 48 * 1024;  // bytes of shared memory

// Bytes that a block may have on the current device where its kernel asks for them.
cudaError_t find_most_shared(int* bytes) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// As many blocks as the device holds at a time, for kernels whose blocks walk over rows.
template <typename Kernel>
cudaError_t resident_blocks(Kernel kernel, int threads, int shared, int64_t* blocks) {
  int device = 0, processors = 0, per_processor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess && shared > WITHOUT_ASKING) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared);
  }
  *blocks = int64_t(processors) * per_processor;
  return error;
}

}  // namespace

namespace POLYCOM_INSTANCE {

cudaError_t forward(const ForwardArguments& arguments, cudaStream_t stream) {
  if (arguments.problem.rows == 0) return cudaSuccess;
  launch<POLYCOM_STORAGE>(
      arguments, WITHOUT_ASKING, [&](auto kernel, const Shape& shape, const ForwardArguments& with) {
        constexpr int64_t max_blocks = 0x7fffffff;
        const int64_t blocks = blocks_for(shape, with.problem.rows);
        kernel<<<unsigned(blocks < max_blocks ? blocks : max_blocks), shape.threads, shape.shared, stream>>>(
            with, shape.vectors);
      });
  return cudaGetLastError();
}

cudaError_t backward(BackwardArguments arguments, float* coefficients, Allocate allocate, void* context,
                     cudaStream_t stream) {
  const Problem& problem = arguments.problem;
  const Parameters& parameters = arguments.parameters;
  int most_shared = 0;
  cudaError_t error = find_most_shared(&most_shared);
  int64_t items = 0;
  if (error == cudaSuccess && problem.rows > 0) {
    launch<POLYCOM_STORAGE>(arguments, most_shared, [&](auto kernel, const Shape& shape, BackwardArguments with) {
      int64_t blocks = 0;
      error = resident_blocks(kernel, shape.threads, shape.shared, &blocks);
      if (error != cudaSuccess) return;
      if (blocks_for(shape, problem.rows) < blocks) blocks = blocks_for(shape, problem.rows);
      if (problem.step == Step::WHOLE) {
        items = parameters.ends ? problem.rows : blocks * (shape.threads / shape.threads_per_row);
        with.terms = allocate(context, items * (problem.order + 1));
        arguments.terms = with.terms;
      }
      kernel<<<unsigned(blocks), shape.threads, shape.shared, stream>>>(with, shape.vectors);
    });
    if (error == cudaSuccess) error = cudaGetLastError();
  }
  if (error != cudaSuccess || problem.step != Step::WHOLE) return error;
  launch_sums(
      arguments.terms, items, parameters, problem.order, coefficients,
      [&](int64_t floats) { return allocate(context, floats); },
      [&](auto kernel, int blocks, auto... with) { kernel<<<blocks, SUM_THREADS, 0, stream>>>(with...); });
  return cudaGetLastError();
}

cudaError_t probe() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, sum_terms_kernel<4>);
}

}  // namespace POLYCOM_INSTANCE
}  // namespace polycom
