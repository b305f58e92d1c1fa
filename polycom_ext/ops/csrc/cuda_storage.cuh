// Storage types on the device: sixteen bytes at a time as four words, each of one float or two 16-bit numbers.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "block_emulator.h"  // the tests run these kernels on a CPU
#endif

#include "polynomial.h"

namespace polycom {
namespace {

struct alignas(16) Packed {
  uint32_t word[4];
};

struct FloatStorage {
  using Element = float;
  static constexpr int PER_WORD = 1;
  static __device__ __forceinline__ void unpack(uint32_t word, float (&values)[1]) { values[0] = float_of_bits(word); }
  static __device__ __forceinline__ uint32_t pack(const float (&values)[1]) { return bits_of_float(values[0]); }
  static __device__ __forceinline__ float load(float element) { return element; }
  static __device__ __forceinline__ float narrow(float value) { return value; }
};

struct BFloat16Storage {
  using Element = uint16_t;
  static constexpr int PER_WORD = 2;
  static __device__ __forceinline__ void unpack(uint32_t word, float (&values)[2]) {
    values[0] = float_of_bits(word << 16);
    values[1] = float_of_bits(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t pack(const float (&values)[2]) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
    uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
  }
  static __device__ __forceinline__ float load(uint16_t element) { return float_of_bits(uint32_t(element) << 16); }
  static __device__ __forceinline__ uint16_t narrow(float value) { return uint16_t(pack({value, 0.0f})); }
};

struct HalfStorage {
  using Element = uint16_t;
  static constexpr int PER_WORD = 2;
  static __device__ __forceinline__ void unpack(uint32_t word, float (&values)[2]) {
    __half2 pair;
    memcpy(&pair, &word, sizeof word);
    const float2 wide = __half22float2(pair);
    values[0] = wide.x;
    values[1] = wide.y;
  }
  static __device__ __forceinline__ uint32_t pack(const float (&values)[2]) {
    const __half2 pair = __floats2half2_rn(values[0], values[1]);
    uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
  }
  static __device__ __forceinline__ float load(uint16_t element) {
    float values[2];
    unpack(element, values);
    return values[0];
  }
  static __device__ __forceinline__ uint16_t narrow(float value) { return uint16_t(pack({value, 0.0f})); }
};

}  // namespace
}  // namespace polycom
