// The CUDA kernels: forward, backward, and the second stage of the coefficient gradients' reduction. Sums over a row,
// and of the coefficient gradients, run in a fixed order: results are bitwise repeatable.
#pragma once

#include "cuda_row.cuh"

namespace polycom {
namespace {

constexpr int NARROW_THREADS = 128;  // four rows a block, a warp each

template <typename S, int R, bool RECTIFY, bool BIASED, int VECTORS>
__device__ __forceinline__ void power_sums(const Tile<S, VECTORS>& x, const RowParameters& parameters, Place& place,
                                           float unit, float (&sums)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) sums[i] = 0.0f;
  for_each_input<BIASED>(x, parameters, place, [&](float u) { add_powers<R>(rho<RECTIFY>(u) * unit, sums); });
  reduce_row<Sum>(sums, place);
}

// Where forward_rows leaves y: as it is.
template <typename S>
struct StoredResult {
  void* y;

  template <int VECTORS>
  __device__ __forceinline__ void clear(int64_t row, const Place& place) {
    clear_row<S, VECTORS>(y, row, place);
  }

  template <bool BIASED, int VECTORS, typename Function>
  __device__ __forceinline__ void write(int64_t row, const Tile<S, VECTORS>& x, const RowParameters& parameters,
                                        const Place& place, Function function) {
    write_row<BIASED>(row_of<S>(y, row, place), x, parameters, place, function);
  }
};

template <typename S, int R, bool RECTIFY, bool BIASED, int VECTORS, typename Result>
__device__ __forceinline__ void forward_rows(const ForwardArguments& arguments, Place& place, Result& result) {
  const Problem& problem = arguments.problem;
  for (int64_t row = place.first_row; row < problem.rows; row += place.row_stride) {
    Tile<S, VECTORS> x(arguments.x, row, place);
    const int expert = owner(arguments.parameters, row);
    if (POLYCOM_UNUSUAL(expert == arguments.parameters.experts)) {
      result.template clear<VECTORS>(row, place);
      clear_columns<R>(arguments.scales, row, place);
      if (problem.step == Step::REDUCE) clear_columns<R>(arguments.power_sums, row, place);
      continue;
    }
    const RowParameters parameters(arguments.parameters, problem, row, expert);
    RowScales<R> scales = no_scales<R>();
    float kept[R];
    if (POLYCOM_UNUSUAL(problem.step == Step::APPLY)) {
      scales = scales_from_total<R>(arguments.power_sums + row * R, problem.inverse_width, problem.eps, kept);
    } else if (!RECTIFY || problem.normalize) {
      float sums[R];
      int exponent = 0;
      power_sums<S, R, RECTIFY, BIASED>(x, parameters, place, 1.0f, sums);
      x.keep_packed();
      if (POLYCOM_UNUSUAL(!all_finite(sums))) {  // the same answer on every thread of the row
        float maximum[1] = {0.0f};
        for_each_input<BIASED>(x, parameters, place, [&](float u) {
          maximum[0] = Maximum::combine(maximum[0], fabsf(rho<RECTIFY>(u)));
        });
        reduce_row<Maximum>(maximum, place);
        x.keep_packed();
        exponent = range_exponent(maximum[0]);
        power_sums<S, R, RECTIFY, BIASED>(x, parameters, place, power_of_two(-exponent), sums);
        x.keep_packed();
      }
      if (POLYCOM_UNUSUAL(problem.step == Step::REDUCE)) {
        if (place.lane == 0) {
          for (int i = 0; i < R; ++i) arguments.power_sums[row * R + i] = unscaled_sum(sums[i], exponent, i + 1);
        }
        continue;
      }
      scales = scales_from_sums<R>(sums, exponent, problem.inverse_width, problem.eps, kept);
    }
    if ((!RECTIFY || problem.normalize) && arguments.scales && place.lane < R) {
      arguments.scales[row * R + place.lane] = of_lane(kept, place);
    }
    const Evaluation<R> evaluate(parameters.weight, parameters.bias, parameters.row_scale, scales);
    constexpr bool SCALED = Tile<S, VECTORS>::template SCALES<RECTIFY, BIASED>;
    if constexpr (SCALED) x.scale(scales.sigma);
    result.template write<BIASED>(row, x, parameters, place, [&](float u) {
      return evaluate(moderate<RECTIFY, SCALED>(u, scales.sigma));
    });
  }
}

// A warp holds a row where the block has NARROW_THREADS, else the whole block does.
template <typename S, int R, bool RECTIFY, bool BIASED, int VECTORS, int THREADS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) forward_kernel(ForwardArguments arguments, int vectors) {
  Place place(THREADS == NARROW_THREADS ? WARP : int(blockDim.x), THREADS, arguments.problem.width, vectors);
  StoredResult<S> result{arguments.y};
  forward_rows<S, R, RECTIFY, BIASED, VECTORS>(arguments, place, result);
}

// With STAGED, a row's pieces are on their way to shared memory while the row before is worked on: rows that are so wide
// that the processor holds few of them would else leave the memory waiting.
template <typename S, int R, bool RECTIFY, bool BIASED, int VECTORS, int THREADS, int BLOCKS, bool STAGED>
__global__ void __launch_bounds__(THREADS, BLOCKS) backward_kernel(BackwardArguments arguments, int vectors) {
  const Problem& problem = arguments.problem;
  Place place(THREADS == NARROW_THREADS ? WARP : int(blockDim.x), THREADS, problem.width, vectors);
  const bool grouped = POLYCOM_UNUSUAL(arguments.parameters.ends);
  float term = 0.0f;  // of the coefficient that is this lane's
  const Staged stage_x = stage<VECTORS>(place, 0), stage_grad = stage<VECTORS>(place, 1);
  if (STAGED && place.first_row < problem.rows) {
    start_row<S, VECTORS>(arguments.x, place.first_row, place, stage_x);
    start_row<S, VECTORS>(arguments.grad_y, place.first_row, place, stage_grad);
  }
  for (int64_t row = place.first_row; row < problem.rows; row += place.row_stride) {
    if constexpr (STAGED) wait_for_copies();
    Tile<S, VECTORS> x = STAGED ? Tile<S, VECTORS>(arguments.x, row, place, stage_x)
                                : Tile<S, VECTORS>(arguments.x, row, place);
    Tile<S, VECTORS> grad = STAGED ? Tile<S, VECTORS>(arguments.grad_y, row, place, stage_grad)
                                   : Tile<S, VECTORS>(arguments.grad_y, row, place);
    if constexpr (STAGED) {
      x.keep_packed();  // what was staged is in registers before the next row overwrites it
      grad.keep_packed();
      const int64_t next = row + place.row_stride;
      if (next < problem.rows) {
        start_row<S, VECTORS>(arguments.x, next, place, stage_x);
        start_row<S, VECTORS>(arguments.grad_y, next, place, stage_grad);
      }
    }
    const int expert = owner(arguments.parameters, row);
    if (POLYCOM_UNUSUAL(expert == arguments.parameters.experts)) {
      clear_row<S, VECTORS>(arguments.grad_x, row, place);
      clear_row<S, VECTORS>(arguments.y, row, place);
      clear_columns<1>(arguments.grad_row_scale, row, place);
      if (problem.step == Step::REDUCE) clear_columns<R + 1>(arguments.dots, row, place);
      continue;
    }
    const RowParameters parameters(arguments.parameters, problem, row, expert);
    const bool normalize = !RECTIFY || problem.normalize;
    const RowScales<R> scales = normalize ? scales_from_kept<R>(arguments.scales + row * R) : no_scales<R>();
    constexpr bool SCALED = Tile<S, VECTORS>::template SCALES<RECTIFY, BIASED>;
    if constexpr (SCALED) x.scale(scales.sigma);
    float dots[R + 1];
    if (POLYCOM_UNUSUAL(problem.step == Step::APPLY)) {
#pragma unroll
      for (int i = 0; i <= R; ++i) dots[i] = arguments.dots[row * (R + 1) + i];
    } else {
#pragma unroll
      for (int i = 0; i <= R; ++i) dots[i] = 0.0f;
      for_each_pair<BIASED>(x, grad, parameters, place,
                            [&](float u, float g) { add_dots<R>(g, moderate<RECTIFY, SCALED>(u, scales.sigma), dots); });
      reduce_row<Sum>(dots, place);
      x.keep_packed();
      grad.keep_packed();
#pragma unroll
      for (int i = 1; i <= R; ++i) dots[i] *= scales.s[i - 1];
    }
    if (POLYCOM_UNUSUAL(problem.step == Step::REDUCE)) {
      if (place.lane <= R) arguments.dots[row * (R + 1) + place.lane] = of_lane(dots, place);
      continue;
    }
    if (POLYCOM_UNUSUAL(arguments.grad_row_scale && place.lane == 0)) {
      arguments.grad_row_scale[row] = row_scale_gradient<R>(parameters.weight, parameters.bias, dots);
    }
    if (arguments.terms) {
      const float own = parameters.row_scale * of_lane(dots, place);
      term += own;
      if (grouped && place.lane <= R) arguments.terms[row * (R + 1) + R - place.lane] = own;
    }
    const Gradient<R> gradient(parameters.weight, parameters.row_scale, scales, dots, problem.inverse_width);
    const auto slope = [&](float u, float g) {
      const float v = moderate<RECTIFY, SCALED>(u, scales.sigma);
      // Not normalised, v may be so large that the projection, whose factors are zero, would not be.
      const float projection = normalize ? gradient.projection(v) : 0.0f;
      const float result = gradient.slope(v) * g - projection;
      return RECTIFY && !(u > 0.0f) ? 0.0f : result;
    };
    const Evaluation<R> polynomial(parameters.weight, parameters.bias, parameters.row_scale, scales);
    const auto evaluate = [&](float u) { return polynomial(moderate<RECTIFY, SCALED>(u, scales.sigma)); };
    write_rows<BIASED>(row_of<S>(arguments.grad_x, row, place),
                       arguments.y ? row_of<S>(arguments.y, row, place) : nullptr, x, grad, parameters, place, slope,
                       evaluate);
  }
  if (arguments.terms && !grouped && place.lane <= R) {  // of this group of threads' rows, which may be none
    arguments.terms[place.first_row * (R + 1) + R - place.lane] = term;
  }
}

constexpr int SUM_THREADS = 512;
constexpr int MAX_SLICES = 16;

// Blocks that share an expert's items, of which there may be as many as rows.
inline int slices_for(int64_t items) {
  const int64_t slices = items / 4096;
  return slices < 1 ? 1 : slices > MAX_SLICES ? MAX_SLICES : int(slices);
}

// sums[expert, slice] = the sum over the expert's slice of the items, a block each: a stage of the reduction of the
// coefficient gradients. Without ends every expert has as many items, one expert's after another's.
template <int COLUMNS>
__global__ void __launch_bounds__(SUM_THREADS) sum_terms_kernel(const float* terms, int64_t items, const int32_t* ends,
                                                                int slices, float* sums) {
  constexpr int ACTIVE = SUM_THREADS / COLUMNS * COLUMNS;  // a thread sums one column
  __shared__ double partial[ACTIVE];
  const int expert = int(blockIdx.x) / slices, slice = int(blockIdx.x) % slices, thread = int(threadIdx.x);
  int64_t begin = items * expert, end = begin + items;
  if (ends) {
    begin = expert > 0 ? ends[expert - 1] : 0;
    end = ends[expert] < items ? ends[expert] : items;
  }
  const int64_t count = end > begin ? end - begin : 0;
  const int64_t first = begin + count * slice / slices, last = begin + count * (slice + 1) / slices;
  if (thread < ACTIVE) {
    double sum = 0.0;
    for (int64_t at = first * COLUMNS + thread; at < last * COLUMNS; at += ACTIVE) sum += double(terms[at]);
    partial[thread] = sum;
  }
  __syncthreads();
  for (int size = ACTIVE / COLUMNS; size > 1;) {
    const int half = (size + 1) / 2;
    if (thread < (size - half) * COLUMNS) partial[thread] += partial[thread + half * COLUMNS];
    size = half;
    __syncthreads();
  }
  if (thread < COLUMNS) sums[int64_t(blockIdx.x) * COLUMNS + thread] = float(partial[thread]);
}

}  // namespace
}  // namespace polycom
