// What one call of a kernel reads and writes; the same for CPU and CUDA.
#pragma once

#include <cstdint>

namespace polycom {

enum class Storage : int { FLOAT = 0, BFLOAT16 = 1, HALF = 2 };

// A row that lies whole in memory takes one step. A row sharded over ranks takes two, with an all-reduce between.
enum class Step : int { WHOLE = 0, REDUCE = 1, APPLY = 2 };

struct Problem {
  Storage storage;
  int order;
  bool rectify;    // u = ReLU(x)
  bool normalize;  // t_i = u^i / rms(u^i)
  Step step;
  float eps;
  int64_t rows;
  int64_t width;
  float inverse_width;  // 1 / the width of the whole row, over all shards
};

struct Parameters {
  const float* weight;     // (experts, order), descending powers
  const float* bias;       // (experts,)
  const float* pre_bias;   // (width,) or (experts, width), added to x; or null
  const float* row_scale;  // (rows,), multiplied into y; or null
  const int32_t* ends;     // (experts,), the row after each expert's last; null for one expert
  int experts;
  bool pre_bias_per_expert;
};

struct ForwardArguments {
  Problem problem;
  Parameters parameters;
  const void* x;
  void* y;
  float* scales;       // (rows, order): written, unless null
  double* power_sums;  // (rows, order), of u / 2^16: written by REDUCE, read by APPLY
};

struct BackwardArguments {
  Problem problem;
  Parameters parameters;
  const void* x;
  const void* grad_y;
  const float* scales;  // (rows, order) as forward wrote them; null if not normalised
  void* grad_x;
  void* y;                // recomputed, unless null
  float* dots;            // (rows, order + 1), <g, t_i>: written by WHOLE on CPU and by REDUCE, read by APPLY
  float* grad_row_scale;  // (rows,), unless null
  float* terms;           // CUDA, WHOLE: (items, order + 1), what the coefficient gradients are the sums of
};

}  // namespace polycom
