// The CUDA kernels: forward, backward, and the second stage of the coefficient gradients' reduction. Sums over a row,
// and of the coefficient gradients, run in a fixed order: results are bitwise repeatable.
#pragma once

#include "cuda_row.cuh"

namespace polycom {
namespace {

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
    const int expert = owner(arguments.parameters, row);
    if (expert == arguments.parameters.experts) {
      clear_row<S, VECTORS>(arguments.y, row, place);
      clear_columns<R>(arguments.scales, row, place);
      if (problem.step == Step::REDUCE) clear_columns<R>(arguments.power_sums, row, place);
      continue;
    }
    const RowParameters parameters(arguments.parameters, problem, row, expert);
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
    const int expert = owner(arguments.parameters, row);
    if (expert == arguments.parameters.experts) {
      clear_row<S, VECTORS>(arguments.grad_x, row, place);
      clear_row<S, VECTORS>(arguments.y, row, place);
      clear_columns<1>(arguments.grad_row_scale, row, place);
      if (problem.step == Step::REDUCE) clear_columns<R + 1>(arguments.dots, row, place);
      continue;
    }
    const RowParameters parameters(arguments.parameters, problem, row, expert);
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
  const int64_t begin = ends && expert > 0 ? ends[expert - 1] : 0;
  const int64_t end = ends && ends[expert] < items ? ends[expert] : items;
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
