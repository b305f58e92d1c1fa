// Rows of y into FP8 bytes and scales, on the CPU. Nobody trains in FP8 there: what counts is that the bytes are those.
#pragma once

#include <vector>

#include "quantization.h"

namespace polycom {
namespace {

inline float bfloat16_value(uint16_t bits) { return float_of_bits(uint32_t(bits) << 16); }

inline float largest_of(const uint16_t* y, int64_t count) {
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) largest = fmaxf(largest, fabsf(bfloat16_value(y[i])));
  return largest;
}

inline void write_bytes(const uint16_t* y, int64_t count, float scale, uint8_t* bytes) {
  for (int64_t i = 0; i < count; ++i) bytes[i] = uint8_t(e4m3_of(bfloat16_value(y[i]) * scale));
}

template <Recipe RECIPE>
void quantize_blocks(const Quantization& to, const uint16_t* y, int64_t row, int64_t width) {
  constexpr int BLOCK = block_of(RECIPE);
  for (int64_t begin = 0; begin < width; begin += BLOCK) {
    const int64_t count = begin + BLOCK < width ? BLOCK : width - begin;
    const BlockScale<RECIPE> block(to, largest_of(y + begin, count));
    block.write_inverse(to.inverses + place_of_scale<RECIPE>(to, row, begin / BLOCK));
    write_bytes(y + begin, count, block.scale, to.data + row * width + begin);
  }
}

// y: (rows, width), bfloat16. Rows [begin, end), but for what is one number of all rows.
inline void quantize_rows(const Quantization& to, const uint16_t* y, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint16_t* const of_row = y + row * width;
    switch (to.recipe) {
      case Recipe::TENSOR: write_bytes(of_row, width, *to.scale, to.data + row * width); break;
      case Recipe::BLOCKS: quantize_blocks<Recipe::BLOCKS>(to, of_row, row, width); break;
      case Recipe::MX: quantize_blocks<Recipe::MX>(to, of_row, row, width); break;
    }
  }
}

}  // namespace
}  // namespace polycom
