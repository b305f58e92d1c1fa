// The CUDA kernels. A group of threads owns a row: a warp, or the whole block. With VECTORS > 0 every thread keeps
// VECTORS sixteen-byte pieces of the row in registers, in storage type, so that memory is read once; VECTORS = 0 is
// the looped path for any width and alignment, which reads a row again for each step.
//
// Sums over a row, and of the coefficient gradients, run in a fixed order: results are bitwise repeatable.
#pragma once

#include "arguments.h"
#include "cuda_storage.cuh"

namespace polycom {
namespace {

constexpr int WARP = 32;
constexpr int MAX_WARPS = 32;

template <typename S>
constexpr int PER_VECTOR = 4 * S::PER_WORD;

// Where this thread works: its row group, its place in it, and how far the row goes in whole vectors.
struct Place {
  int lane;
  int threads;  // per row
  int64_t first_row;
  int64_t row_stride;
  int width;
  int vectors;

  __device__ __forceinline__ Place(int threads_per_row, int64_t width_, int vectors_)
      : lane(int(threadIdx.x) % threads_per_row), threads(threads_per_row), width(int(width_)), vectors(vectors_) {
    const int rows_per_block = int(blockDim.x) / threads_per_row;
    first_row = int64_t(blockIdx.x) * rows_per_block + int(threadIdx.x) / threads_per_row;
    row_stride = int64_t(gridDim.x) * rows_per_block;
  }
};

struct Sum {
  static __device__ __forceinline__ float combine(float a, float b) { return a + b; }
};

struct Maximum {
  static __device__ __forceinline__ float combine(float a, float b) { return a < b ? b : a; }
};

// values[i] combined over the threads of a row, on every one of them.
template <typename Operation, int N>
__device__ __forceinline__ void reduce_row(float (&values)[N], const Place& place) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] = Operation::combine(values[i], __shfl_xor_sync(0xffffffffu, values[i], offset));
    }
  }
  if (place.threads == WARP) return;
  __shared__ float shared[MAX_WARPS * N];
  const int warps = place.threads / WARP;
  if (place.lane % WARP == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) shared[place.lane / WARP * N + i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = shared[i];
  for (int warp = 1; warp < warps; ++warp) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = Operation::combine(values[i], shared[warp * N + i]);
  }
  __syncthreads();
}

// A row's pieces that belong to this thread: in registers, or read again at every use.
template <typename S, int VECTORS>
struct Tile {
  const typename S::Element* row;
  Packed kept[VECTORS > 0 ? VECTORS : 1];

  __device__ __forceinline__ Tile(const void* base, int64_t index, const Place& place)
      : row(static_cast<const typename S::Element*>(base) + index * place.width) {
    if constexpr (VECTORS > 0) {
#pragma unroll
      for (int k = 0; k < VECTORS; ++k) {
        const int vector = place.lane + k * place.threads;
        if (vector < place.vectors) kept[k] = reinterpret_cast<const Packed*>(row)[vector];
      }
    }
  }

  __device__ __forceinline__ Packed piece(int k, int vector) const {
    if constexpr (VECTORS > 0) return kept[k];
    return reinterpret_cast<const Packed*>(row)[vector];
  }

  // Hides from the compiler that the pieces are those of the step before: it would keep them unpacked, as floats,
  // which takes twice the registers and spills.
  __device__ __forceinline__ void keep_packed() {
#ifdef __CUDA_ARCH__
    if constexpr (VECTORS > 0) {
#pragma unroll
      for (int k = 0; k < VECTORS; ++k) {
#pragma unroll
        for (int w = 0; w < 4; ++w) asm volatile("" : "+r"(kept[k].word[w]));
      }
    }
#endif
  }
};

// Calls visit(k, vector) for each of this thread's whole vectors.
template <int VECTORS, typename Visit>
__device__ __forceinline__ void for_each_vector(const Place& place, Visit visit) {
  if constexpr (VECTORS > 0) {
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      const int vector = place.lane + k * place.threads;
      if (vector < place.vectors) visit(k, vector);
    }
  } else {
    for (int vector = place.lane; vector < place.vectors; vector += place.threads) visit(0, vector);
  }
}

// Calls visit(column) for each of this thread's elements outside whole vectors (looped path only).
template <typename S, int VECTORS, typename Visit>
__device__ __forceinline__ void for_each_remaining(const Place& place, Visit visit) {
  if constexpr (VECTORS == 0) {
    const int begin = place.vectors * PER_VECTOR<S>;
    for (int column = begin + place.lane; column < place.width; column += place.threads) visit(column);
  }
}

struct RowParameters {
  const float* weight;
  float bias;
  const float* pre_bias;
  float row_scale;

  __device__ __forceinline__ RowParameters(const Parameters& all, const Problem& problem, int64_t row) {
    const int expert = all.ends ? expert_of_row(all.ends, all.experts, row) : 0;
    weight = all.weight + int64_t(expert) * problem.order;
    bias = all.bias[expert];
    pre_bias = all.pre_bias ? all.pre_bias + (all.pre_bias_per_expert ? expert : 0) * problem.width : nullptr;
    row_scale = all.row_scale ? all.row_scale[row] : 1.0f;
  }
};

template <bool RECTIFY>
__device__ __forceinline__ float rho(float u) {
  return RECTIFY ? rectified(u) : u;
}

template <typename S>
__device__ __forceinline__ void unpack(const Packed& piece, float (&values)[PER_VECTOR<S>]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float word[S::PER_WORD];
    S::unpack(piece.word[w], word);
#pragma unroll
    for (int i = 0; i < S::PER_WORD; ++i) values[w * S::PER_WORD + i] = word[i];
  }
}

template <typename S>
__device__ __forceinline__ Packed pack(const float (&values)[PER_VECTOR<S>]) {
  Packed piece;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float word[S::PER_WORD];
#pragma unroll
    for (int i = 0; i < S::PER_WORD; ++i) word[i] = values[w * S::PER_WORD + i];
    piece.word[w] = S::pack(word);
  }
  return piece;
}

// The elements of x, pre_bias added, before ReLU.
template <typename S, int VECTORS>
__device__ __forceinline__ void inputs(const Tile<S, VECTORS>& x, const RowParameters& parameters, int k, int vector,
                                       float (&u)[PER_VECTOR<S>]) {
  unpack<S>(x.piece(k, vector), u);
  if (parameters.pre_bias) {
    const float* bias = parameters.pre_bias + vector * PER_VECTOR<S>;
#pragma unroll
    for (int i = 0; i < PER_VECTOR<S>; ++i) u[i] += bias[i];
  }
}

template <typename S, int VECTORS>
__device__ __forceinline__ float input(const Tile<S, VECTORS>& x, const RowParameters& parameters, int column) {
  const float value = S::load(x.row[column]);
  return parameters.pre_bias ? value + parameters.pre_bias[column] : value;
}

// Calls visit(u) for each of this thread's elements of the row.
template <typename S, int VECTORS, typename Visit>
__device__ __forceinline__ void for_each_input(const Tile<S, VECTORS>& x, const RowParameters& parameters,
                                               const Place& place, Visit visit) {
  for_each_vector<VECTORS>(place, [&](int k, int vector) {
    float u[PER_VECTOR<S>];
    inputs(x, parameters, k, vector, u);
#pragma unroll
    for (int i = 0; i < PER_VECTOR<S>; ++i) visit(u[i]);
  });
  for_each_remaining<S, VECTORS>(place, [&](int column) { visit(input(x, parameters, column)); });
}

// The same with the gradient at the element: visit(u, g).
template <typename S, int VECTORS, typename Visit>
__device__ __forceinline__ void for_each_pair(const Tile<S, VECTORS>& x, const Tile<S, VECTORS>& grad,
                                              const RowParameters& parameters, const Place& place, Visit visit) {
  for_each_vector<VECTORS>(place, [&](int k, int vector) {
    float u[PER_VECTOR<S>], g[PER_VECTOR<S>];
    inputs(x, parameters, k, vector, u);
    unpack<S>(grad.piece(k, vector), g);
#pragma unroll
    for (int i = 0; i < PER_VECTOR<S>; ++i) visit(u[i], g[i]);
  });
  for_each_remaining<S, VECTORS>(place, [&](int column) {
    visit(input(x, parameters, column), S::load(grad.row[column]));
  });
}

template <typename S>
__device__ __forceinline__ typename S::Element* row_of(void* out, int64_t row, const Place& place) {
  return static_cast<typename S::Element*>(out) + row * place.width;
}

// out = function(u), element by element.
template <typename S, int VECTORS, typename Function>
__device__ __forceinline__ void write_row(typename S::Element* out, const Tile<S, VECTORS>& x,
                                          const RowParameters& parameters, const Place& place, Function function) {
  for_each_vector<VECTORS>(place, [&](int k, int vector) {
    float u[PER_VECTOR<S>];
    inputs(x, parameters, k, vector, u);
#pragma unroll
    for (int i = 0; i < PER_VECTOR<S>; ++i) u[i] = function(u[i]);
    reinterpret_cast<Packed*>(out)[vector] = pack<S>(u);
  });
  for_each_remaining<S, VECTORS>(place, [&](int column) {
    out[column] = S::narrow(function(input(x, parameters, column)));
  });
}

// out = function(u, g) and, unless null, y = evaluate(u), element by element. In one pass over the pieces, so that each
// is dead after its turn: with the two passes apart, wide rows spill.
template <typename S, int VECTORS, typename Function, typename Evaluate>
__device__ __forceinline__ void write_rows(typename S::Element* out, typename S::Element* y, const Tile<S, VECTORS>& x,
                                           const Tile<S, VECTORS>& grad, const RowParameters& parameters,
                                           const Place& place, Function function, Evaluate evaluate) {
  for_each_vector<VECTORS>(place, [&](int k, int vector) {
    float u[PER_VECTOR<S>], g[PER_VECTOR<S>];
    inputs(x, parameters, k, vector, u);
    unpack<S>(grad.piece(k, vector), g);
#pragma unroll
    for (int i = 0; i < PER_VECTOR<S>; ++i) g[i] = function(u[i], g[i]);
    reinterpret_cast<Packed*>(out)[vector] = pack<S>(g);
    if (y) {
#pragma unroll
      for (int i = 0; i < PER_VECTOR<S>; ++i) u[i] = evaluate(u[i]);
      reinterpret_cast<Packed*>(y)[vector] = pack<S>(u);
    }
  });
  for_each_remaining<S, VECTORS>(place, [&](int column) {
    const float u = input(x, parameters, column);
    out[column] = S::narrow(function(u, S::load(grad.row[column])));
    if (y) y[column] = S::narrow(evaluate(u));
  });
}

template <typename S, int R, bool RECTIFY, int VECTORS>
__device__ __forceinline__ void power_sums(const Tile<S, VECTORS>& x, const RowParameters& parameters,
                                           const Place& place, float unit, float (&sums)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) sums[i] = 0.0f;
  for_each_input(x, parameters, place, [&](float u) { add_powers<R>(rho<RECTIFY>(u) * unit, sums); });
  reduce_row<Sum>(sums, place);
}

template <typename S, int R, bool RECTIFY, int VECTORS, int THREADS>
__global__ void __launch_bounds__(THREADS, 1) forward_kernel(ForwardArguments arguments, int threads_per_row,
                                                          int vectors) {
  const Problem& problem = arguments.problem;
  const Place place(threads_per_row, problem.width, vectors);
  for (int64_t row = place.first_row; row < problem.rows; row += place.row_stride) {
    const RowParameters parameters(arguments.parameters, problem, row);
    Tile<S, VECTORS> x(arguments.x, row, place);
    RowScales<R> scales = no_scales<R>();
    float kept[R];
    if (problem.step == Step::APPLY) {
      scales = scales_from_total<R>(arguments.power_sums + row * R, problem.inverse_width, problem.eps, kept);
    } else if (problem.normalize) {
      float sums[R];
      int exponent = 0;
      power_sums<S, R, RECTIFY>(x, parameters, place, 1.0f, sums);
      x.keep_packed();
      if (!all_finite(sums)) {  // the same answer on every thread of the row
        float maximum[1] = {0.0f};
        for_each_input(x, parameters, place, [&](float u) {
          maximum[0] = Maximum::combine(maximum[0], fabsf(rho<RECTIFY>(u)));
        });
        reduce_row<Maximum>(maximum, place);
        x.keep_packed();
        exponent = range_exponent(maximum[0]);
        power_sums<S, R, RECTIFY>(x, parameters, place, power_of_two(-exponent), sums);
        x.keep_packed();
      }
      if (problem.step == Step::REDUCE) {
        if (place.lane == 0) {
          for (int i = 0; i < R; ++i) arguments.power_sums[row * R + i] = unscaled_sum(sums[i], exponent, i + 1);
        }
        continue;
      }
      scales = scales_from_sums<R>(sums, exponent, problem.inverse_width, problem.eps, kept);
    }
    if (problem.normalize && arguments.scales && place.lane == 0) {
#pragma unroll
      for (int i = 0; i < R; ++i) arguments.scales[row * R + i] = kept[i];
    }
    const Evaluation<R> evaluate(parameters.weight, parameters.bias, parameters.row_scale, scales);
    write_row<S>(row_of<S>(arguments.y, row, place), x, parameters, place,
                          [&](float u) { return evaluate(rho<RECTIFY>(u) * scales.sigma); });
  }
}

template <typename S, int R, bool RECTIFY, int VECTORS, int THREADS>
__global__ void __launch_bounds__(THREADS, 1) backward_kernel(BackwardArguments arguments, int threads_per_row,
                                                           int vectors) {
  const Problem& problem = arguments.problem;
  const Place place(threads_per_row, problem.width, vectors);
  if (place.first_row >= problem.rows && arguments.terms && !arguments.parameters.ends && place.lane == 0) {
    for (int i = 0; i <= R; ++i) arguments.terms[place.first_row * (R + 1) + i] = 0.0f;
  }
  for (int64_t row = place.first_row; row < problem.rows; row += place.row_stride) {
    const RowParameters parameters(arguments.parameters, problem, row);
    Tile<S, VECTORS> x(arguments.x, row, place);
    Tile<S, VECTORS> grad(arguments.grad_y, row, place);
    const RowScales<R> scales =
        problem.normalize ? scales_from_kept<R>(arguments.scales + row * R) : no_scales<R>();
    float dots[R + 1];
    if (problem.step == Step::APPLY) {
#pragma unroll
      for (int i = 0; i <= R; ++i) dots[i] = arguments.dots[row * (R + 1) + i];
    } else {
#pragma unroll
      for (int i = 0; i <= R; ++i) dots[i] = 0.0f;
      for_each_pair(x, grad, parameters, place,
                    [&](float u, float g) { add_dots<R>(g, rho<RECTIFY>(u) * scales.sigma, dots); });
      reduce_row<Sum>(dots, place);
      x.keep_packed();
      grad.keep_packed();
#pragma unroll
      for (int i = 1; i <= R; ++i) dots[i] *= scales.s[i - 1];
    }
    if (problem.step == Step::REDUCE) {
      if (place.lane == 0) {
        for (int i = 0; i <= R; ++i) arguments.dots[row * (R + 1) + i] = dots[i];
      }
      continue;
    }
    if (arguments.grad_row_scale && place.lane == 0) {
      arguments.grad_row_scale[row] = row_scale_gradient<R>(parameters.weight, parameters.bias, dots);
    }
    if (arguments.terms && place.lane == 0) {
      // Kept in memory, of which this group of threads owns its part: registers are what wide rows lack.
      const bool first = arguments.parameters.ends || row == place.first_row;
      float* terms = arguments.terms + (arguments.parameters.ends ? row : place.first_row) * (R + 1);
#pragma unroll
      for (int i = 0; i <= R; ++i) terms[R - i] = (first ? 0.0f : terms[R - i]) + parameters.row_scale * dots[i];
    }
    const Gradient<R> gradient(parameters.weight, parameters.row_scale, scales, dots,
                               problem.inverse_width);
    const auto slope = [&](float u, float g) {
      const float v = rho<RECTIFY>(u) * scales.sigma;
      // Not normalised, v may be so large that the projection, whose factors are zero, would not be.
      const float projection = problem.normalize ? gradient.projection(v) : 0.0f;
      const float result = gradient.slope(v) * g - projection;
      return RECTIFY && !(u > 0.0f) ? 0.0f : result;
    };
    const Evaluation<R> polynomial(parameters.weight, parameters.bias, parameters.row_scale, scales);
    const auto evaluate = [&](float u) { return polynomial(rho<RECTIFY>(u) * scales.sigma); };
    write_rows<S>(row_of<S>(arguments.grad_x, row, place), arguments.y ? row_of<S>(arguments.y, row, place) : nullptr,
                  x, grad, parameters, place, slope, evaluate);
  }
}

constexpr int SUM_THREADS = 256;

// coefficients[expert] = the sum of its items, by one block an expert: second stage of the reduction.
__global__ void __launch_bounds__(SUM_THREADS) sum_terms_kernel(const float* terms, int64_t items, int columns,
                                                                const int32_t* ends, int experts,
                                                                float* coefficients) {
  __shared__ double partial[SUM_THREADS];
  const int expert = int(blockIdx.x);
  // Ends need not reach the last row, nor stop at it: as in expert_of_row, the last expert takes the rest.
  const int64_t begin = ends && expert > 0 ? (ends[expert - 1] < items ? ends[expert - 1] : items) : 0;
  const int64_t end = ends && expert + 1 < experts ? (ends[expert] < items ? ends[expert] : items) : items;
  for (int column = 0; column < columns; ++column) {
    double sum = 0.0;
    for (int64_t item = begin + int(threadIdx.x); item < end; item += SUM_THREADS) {
      sum += double(terms[item * columns + column]);
    }
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (int half = SUM_THREADS / 2; half > 0; half /= 2) {
      if (int(threadIdx.x) < half) partial[threadIdx.x] += partial[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) coefficients[expert * columns + column] = float(partial[0]);
    __syncthreads();
  }
}

}  // namespace
}  // namespace polycom
