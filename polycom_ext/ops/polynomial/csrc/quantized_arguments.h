// What a call of the forward that quantizes y reads and writes; the same for CPU and CUDA.
#pragma once

#include "arguments.h"

namespace polycom {

constexpr int QUANTIZED_ORDER = 3;
// A kernel holds whole rows: of these widths, in pieces of eight numbers.
constexpr int64_t MAX_QUANTIZED_WIDTH = 32768;

// The same numbers as quantized.Recipe.
enum class Recipe : int { TENSOR = 0, BLOCKS = 1, MX = 2 };

struct Quantization {
  Recipe recipe;
  uint8_t* data;       // (rows, width)
  uint8_t* inverses;  // of scales. TENSOR: a float; BLOCKS: floats (blocks, stride); MX: bytes (.., stride), exponents of two
  const float* scale;  // TENSOR
  float* largest;      // TENSOR: raised to the largest |y|
  int64_t stride;
  float epsilon;      // BLOCKS: the least that counts as a block's largest |y|
  bool power_of_two;  // BLOCKS: scales are
  bool swizzled;      // MX: inverses in the order of matrix multiplications, not (rows, stride)
};

struct QuantizedArguments {
  ForwardArguments forward;  // whose y is null
  Quantization quantization;
};

}  // namespace polycom
