// What a row's y becomes where the next layer multiplies in FP8: bytes of E4M3 and their scales, to the bit as Transformer
// Engine's quantizers make them of y in its storage type (common/recipe/recipe_common.cuh, common/cast/mxfp8 there).
//
// One scale for the whole tensor, known before (delayed scaling); one for 128 numbers of a row; or a power of two for 32
// of them (MXFP8). Scales look past a NaN, whose own byte is NaN.
#pragma once

#include "polynomial.h"
#include "quantized_arguments.h"

namespace polycom {

namespace {

constexpr float LARGEST_E4M3 = 448.0f;
constexpr float LARGEST_BFLOAT16 = 0x1.fep127f;

// Numbers that share a scale; 0 for all.
constexpr int block_of(Recipe recipe) { return recipe == Recipe::BLOCKS ? 128 : recipe == Recipe::MX ? 32 : 0; }

// The byte of a number, rounded to nearest even, within +-448.
POLYCOM_INLINE uint32_t e4m3_of(float value) {
  const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
  if (magnitude > 0x7f800000u) return 0x7f;
  if (magnitude >= bits_of_float(LARGEST_E4M3)) return sign | 0x7e;
  if (magnitude < bits_of_float(0x1p-6f)) {  // a multiple of 2^-9, to which adding 2^14 rounds
    return sign | (bits_of_float(float_of_bits(magnitude) + 0x1p14f) - bits_of_float(0x1p14f));
  }
  return sign | ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u) - (120u << 23)) >> 20);
}

// BLOCKS: what the numbers of a block are multiplied with.
POLYCOM_INLINE float block_scale(float largest, float epsilon, bool power_of_two) {
  if (largest < epsilon) largest = epsilon;
  if (largest == 0.0f || !is_finite(largest)) return 1.0f;
  float scale = LARGEST_E4M3 / largest;
  if (!is_finite(scale)) scale = LARGEST_BFLOAT16;
  return power_of_two ? float_of_bits(bits_of_float(scale) & 0x7f800000u) : scale;
}

// MX: the exponent, biased by 127, of the power of two by which a block is divided: the least that brings it within 448.
POLYCOM_INLINE uint32_t block_exponent(float largest) {
  const uint32_t bits = bits_of_float(largest * (1.0f / LARGEST_E4M3));
  const uint32_t exponent = bits >> 23, mantissa = bits & 0x7fffffu;
  if (exponent >= 254) return 254;
  return exponent + (mantissa > (exponent == 0 ? 0x400000u : 0u));
}

// 2^(127 - exponent)
POLYCOM_INLINE float inverse_of_exponent(uint32_t exponent) {
  return float_of_bits(exponent == 254 ? 0x00400000u : (254 - exponent) << 23);
}

// Where the scale of a row's block is, in bytes; MX: in tiles of 128 rows and 4 blocks if swizzled.
template <Recipe RECIPE>
POLYCOM_INLINE int64_t place_of_scale(const Quantization& to, int64_t row, int64_t block) {
  if constexpr (RECIPE == Recipe::BLOCKS) return (block * to.stride + row) * int64_t(sizeof(float));
  if (!to.swizzled) return row * to.stride + block;
  const int64_t tile = row / 128 * (to.stride / 4) + block / 4;
  return tile * 512 + row % 32 * 16 + row % 128 / 32 * 4 + block % 4;
}

// What a block is multiplied with, from its largest |y|.
template <Recipe RECIPE>
struct BlockScale {
  float scale;
  uint32_t exponent = 0;

  POLYCOM_INLINE BlockScale(const Quantization& to, float largest) {
    if constexpr (RECIPE == Recipe::MX) {
      exponent = block_exponent(largest);
      scale = inverse_of_exponent(exponent);
    } else {
      scale = block_scale(largest, to.epsilon, to.power_of_two);
    }
  }

  POLYCOM_INLINE void write_inverse(uint8_t* to) const {
    if constexpr (RECIPE == Recipe::MX) {
      *to = uint8_t(exponent);
    } else {
      *reinterpret_cast<float*>(to) = 1.0f / scale;
    }
  }
};

}  // namespace
}  // namespace polycom
