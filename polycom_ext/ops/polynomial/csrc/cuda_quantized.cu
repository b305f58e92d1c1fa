#include "cuda_quantized.cuh"

#include "cuda_instances.h"

namespace polycom {

cudaError_t forward_quantized(const QuantizedArguments& arguments, cudaStream_t stream) {
  if (arguments.forward.problem.rows == 0) return cudaSuccess;
  launch_quantized(arguments, [&](auto kernel, const Shape& shape, const QuantizedArguments& with) {
    constexpr int64_t max_blocks = 0x7fffffff;
    const int64_t blocks = blocks_for(shape, with.forward.problem.rows);
    kernel<<<unsigned(blocks < max_blocks ? blocks : max_blocks), shape.threads, 0, stream>>>(with, shape.vectors);
  });
  return cudaGetLastError();
}

}  // namespace polycom
