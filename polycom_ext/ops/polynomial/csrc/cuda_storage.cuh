// Storage types on the device: sixteen bytes at a time as four words, each of one float or two 16-bit numbers.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "block_emulator.h"  // the tests run these kernels on a CPU
#endif

#include "polynomial.h"

// What the usual call, of whole rows of finite numbers without variants, does not do. benchmarks/kernels.py, which
// counts that call's instructions, compiles it away.
#ifndef POLYCOM_UNUSUAL
#define POLYCOM_UNUSUAL(condition) __builtin_expect(static_cast<bool>(condition), false)
#endif

namespace polycom {
namespace {

constexpr int WARP = 32;

struct alignas(16) Packed {
  uint32_t word[4];
};

// A place in the block's dynamic shared memory, in pieces; this thread's next ones are WARP pieces apart, so that what a
// warp brings or reads at a time lies together: else a copy takes one request of memory for each of its lanes. On the
// device an address of 32 bits, which the compiler is kept from working out anew at every use.
struct Staged {
#ifdef __CUDACC__
  uint32_t address;

  __device__ __forceinline__ explicit Staged(int piece) {
    extern __shared__ Packed dynamic[];
    address = uint32_t(__cvta_generic_to_shared(dynamic + piece));
    asm volatile("" : "+r"(address));
  }
  __device__ __forceinline__ uint32_t piece(int k) const { return address + uint32_t(k) * uint32_t(WARP * sizeof(Packed)); }
#else
  Packed* address;

  explicit Staged(int piece) : address(emulator::dynamic_shared<Packed>() + piece) {}
  Packed* piece(int k) const { return address + k * WARP; }
#endif
};

// Starts a copy to piece k of shared memory that this thread may read after wait_for_copies.
__device__ __forceinline__ void start_copy(const Staged& to, int k, const Packed* from) {
#if !defined(__CUDACC__)
  emulator::start_copy(to.piece(k), from, sizeof(Packed));
#elif defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to.piece(k)), "l"(from) : "memory");
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if !defined(__CUDACC__)
  emulator::wait_for_copies();
#elif defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

__device__ __forceinline__ Packed load_staged(const Staged& from, int k) {
#if !defined(__CUDACC__)
  return *from.piece(k);
#else
  Packed piece = {};
#if defined(__CUDA_ARCH__)
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(piece.word[0]), "=r"(piece.word[1]), "=r"(piece.word[2]), "=r"(piece.word[3])
               : "r"(from.piece(k))
               : "memory");
#endif
  return piece;
#endif
}

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
  // Both numbers times a power of two, as good as exact: bfloat16 has the exponents of float32, and what becomes
  // denormal is nothing beside a row that is scaled down so far.
  static __device__ __forceinline__ uint32_t scale(uint32_t word, float factor) {
#ifdef __CUDACC__
    __nv_bfloat162 pair;
    memcpy(&pair, &word, sizeof word);
    pair = __hmul2(pair, __float2bfloat162_rn(factor));
    memcpy(&word, &pair, sizeof word);
    return word;
#else
    float values[2];
    unpack(word, values);
    return pack({values[0] * factor, values[1] * factor});
#endif
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
