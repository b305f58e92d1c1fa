// Forward that writes FP8 bytes and their scales in y's place. It rounds y to its storage type first, so that the bytes are
// those that a quantizer would make of the forward kernel's y.
#pragma once

#include "cuda_launch.cuh"
#include "quantization.h"

namespace polycom {
namespace {

// Four bytes of E4M3, the first in the lowest place.
__device__ __forceinline__ uint32_t e4m3_word(const float* values) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(values[1]), "f"(values[0]));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(values[3]), "f"(values[2]));
  return uint32_t(low) | uint32_t(high) << 16;
#else
  return e4m3_of(values[0]) | e4m3_of(values[1]) << 8 | e4m3_of(values[2]) << 16 | e4m3_of(values[3]) << 24;
#endif
}

struct alignas(8) PackedBytes {
  uint32_t word[2];
};

// Keeps the compiler from working out the addresses of all of a thread's vectors at once: there are no registers for them.
__device__ __forceinline__ void keep_in_turn(PackedBytes*& out, uint8_t*& inverse) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(out), "+l"(inverse));
#endif
}

// Where forward_rows leaves y, quantized.
template <typename S, Recipe RECIPE>
struct QuantizedResult {
  static_assert(PER_VECTOR<S> == 8);
  static constexpr int BLOCK = block_of(RECIPE);
  using Step = std::conditional_t<RECIPE == Recipe::MX, int, int64_t>;  // from one vector's scale to the next one's

  const Quantization& to;
  float scale = 1.0f;
  float largest = 0.0f;  // TENSOR: of this thread's part of all its rows

  __device__ __forceinline__ explicit QuantizedResult(const Quantization& quantization) : to(quantization) {
    if constexpr (RECIPE == Recipe::TENSOR) scale = *to.scale;
  }

  // Calls values(k, vector, y) for each of this thread's vectors, y being what it shall set, and writes the bytes. All of
  // a warp go on together, as far as one of them has a vector: those of a block share their largest number.
  template <int VECTORS, typename Values>
  __device__ __forceinline__ void write_vectors(int64_t row, const Place& place, Values values) {
    const int in_warp = place.lane % WARP;
    auto* out = reinterpret_cast<PackedBytes*>(to.data + row * place.width) + place.lane;
    uint8_t* inverse = nullptr;
    Step step = 0;  // threads are whole warps: a tile of swizzled scales is left at its own place in the next one
    if constexpr (RECIPE != Recipe::TENSOR) {
      const int64_t first = place_of_scale<RECIPE>(to, row, place.lane / (BLOCK / 8));
      step = Step(place_of_scale<RECIPE>(to, row, (place.lane + place.threads) / (BLOCK / 8)) - first);
      inverse = to.inverses + first;
    }
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      const int vector = place.lane + k * place.threads;
      if (vector - in_warp >= place.vectors) break;
      const bool present = vector < place.vectors;
      Packed rounded = {};
      float own = 0.0f, y[8];
      if (present) {
        values(k, vector, y);
        rounded = pack<S>(y);
        unpack<S>(rounded, y);
#pragma unroll
        for (int i = 0; i < 8; ++i) own = fmaxf(own, fabsf(y[i]));
      }
      if constexpr (RECIPE == Recipe::TENSOR) {
        largest = fmaxf(largest, own);
      } else {
#pragma unroll
        for (int offset = 1; offset < BLOCK / 8; offset *= 2) {
          own = fmaxf(own, __shfl_xor_sync(0xffffffffu, own, offset));
        }
        const BlockScale<RECIPE> block(to, own);
        scale = block.scale;
        if (present && place.lane % (BLOCK / 8) == 0) block.write_inverse(inverse);
      }
      if (present) {
        unpack<S>(rounded, y);
#pragma unroll
        for (int i = 0; i < 8; ++i) y[i] *= scale;
        *out = {e4m3_word(y), e4m3_word(y + 4)};
      }
      out += place.threads;
      inverse += step;
      keep_in_turn(out, inverse);
    }
  }

  template <int VECTORS>
  __device__ __forceinline__ void clear(int64_t row, const Place& place) {
    write_vectors<VECTORS>(row, place, [](int, int, float(&y)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = 0.0f;
    });
  }

  template <bool BIASED, int VECTORS, typename Function>
  __device__ __forceinline__ void write(int64_t row, const Tile<S, VECTORS>& x, const RowParameters& parameters,
                                        const Place& place, Function function) {
    write_vectors<VECTORS>(row, place, [&](int k, int vector, float(&y)[8]) {
      inputs<BIASED>(x, parameters, k, vector, y);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = function(y[i]);
    });
  }

  // After this thread's rows. Few warps find a number that is larger than all before.
  __device__ __forceinline__ void finish(const Place& place) {
    if constexpr (RECIPE == Recipe::TENSOR) {
#pragma unroll
      for (int offset = WARP / 2; offset > 0; offset /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
      }
      if (place.lane % WARP == 0 && largest > *static_cast<volatile float*>(to.largest)) {
        atomicMax(reinterpret_cast<int*>(to.largest), int(bits_of_float(largest)));  // none is negative
      }
      if (blockIdx.x == 0 && threadIdx.x == 0) *reinterpret_cast<float*>(to.inverses) = 1.0f / scale;
    }
  }
};

// For architectures without the format nothing is compiled: FP8 came with compute capability 8.9, and Transformer Engine
// has MXFP8 from 10.0 on.
#ifdef __CUDA_ARCH__
constexpr bool is_compiled(Recipe recipe) { return __CUDA_ARCH__ >= (recipe == Recipe::MX ? 1000 : 890); }
#else
constexpr bool is_compiled(Recipe) { return true; }
#endif

template <typename S, int R, bool RECTIFY, Recipe RECIPE, int VECTORS, int THREADS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) quantized_kernel(QuantizedArguments arguments, int vectors) {
  if constexpr (is_compiled(RECIPE)) {
    Place place(THREADS == NARROW_THREADS ? WARP : int(blockDim.x), THREADS, arguments.forward.problem.width, vectors);
    QuantizedResult<S, RECIPE> result(arguments.quantization);
    forward_rows<S, R, RECTIFY, false, VECTORS>(arguments.forward, place, result);
    result.finish(place);
  }
}

// As many as forward's, but for those that would spill.
constexpr int quantized_blocks(const Hold& hold, bool rectify, Recipe recipe) {
  const bool spills = rectify && recipe != Recipe::TENSOR && hold.threads == 256;
  return spills && hold.blocks > 1 ? hold.blocks - 1 : hold.blocks;
}

template <bool RECTIFY, Recipe RECIPE, int AT = LOOPED + 1, typename Launch>
void launch_quantized_shape(const QuantizedArguments& arguments, const Shape& shape, Launch run) {
  constexpr Hold hold = FORWARD_HOLDS[AT];
  if (shape.hold == AT) {
    return run(quantized_kernel<BFloat16Storage, QUANTIZED_ORDER, RECTIFY, RECIPE, hold.vectors, hold.threads,
                                quantized_blocks(hold, RECTIFY, RECIPE)>,
               shape, arguments);
  }
  if constexpr (AT + 1 < HOLDS) launch_quantized_shape<RECTIFY, RECIPE, AT + 1>(arguments, shape, run);
}

template <bool RECTIFY, typename Launch>
void launch_quantized_recipe(const QuantizedArguments& arguments, const Shape& shape, Launch run) {
  switch (arguments.quantization.recipe) {
    case Recipe::TENSOR: return launch_quantized_shape<RECTIFY, Recipe::TENSOR>(arguments, shape, run);
    case Recipe::BLOCKS: return launch_quantized_shape<RECTIFY, Recipe::BLOCKS>(arguments, shape, run);
    case Recipe::MX: return launch_quantized_shape<RECTIFY, Recipe::MX>(arguments, shape, run);
  }
}

// Calls run(kernel, shape, arguments) with the instance for bfloat16 rows that a kernel holds; without a call for others,
// which the operation refuses.
template <typename Launch>
void launch_quantized(const QuantizedArguments& arguments, Launch run) {
  const Problem& problem = arguments.forward.problem;
  // Forward stages no row, whatever the processor's shared memory.
  const Shape shape =
      choose_shape(problem.width, PER_VECTOR<BFloat16Storage>, true, false, FORWARD_HOLDS, MAX_REDUCTION_BYTES);
  if (problem.rectify) return launch_quantized_recipe<true>(arguments, shape, run);
  launch_quantized_recipe<false>(arguments, shape, run);
}

}  // namespace
}  // namespace polycom
