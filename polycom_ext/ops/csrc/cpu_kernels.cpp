// The CPU kernels. Compiled several times, with POLYCOM_ISA naming the instruction set that the flags allow.
// A row is read twice: the second time from cache. Nothing with external linkage is instantiated but the two
// entry points, so no code of a newer instruction set can be linked into an older one's path.
#include "cpu_kernels.h"
#include "cpu_vector.h"
#include "polynomial.h"

namespace polycom {
namespace {

constexpr int64_t UNROLL = 2;
constexpr int64_t BLOCK = 4096;  // elements summed in float before the sum goes on in double

// Calls visit(column, count) for whole vectors, and once more for what is left.
template <typename Visit>
POLYCOM_INLINE void for_each_vector(int64_t begin, int64_t end, Visit visit) {
  int64_t column = begin;
  for (; column + LANES <= end; column += LANES) visit(column, int64_t(LANES));
  if (column < end) visit(column, end - column);
}

// The same with the index of one of UNROLL accumulators, which breaks the chain of dependent additions.
template <typename Visit>
POLYCOM_INLINE void for_each_vector_unrolled(int64_t begin, int64_t end, Visit visit) {
  int64_t column = begin;
  for (; column + UNROLL * LANES <= end; column += UNROLL * LANES) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < UNROLL; ++i) visit(column + i * LANES, int64_t(LANES), i);
  }
  for_each_vector(column, end, [&](int64_t at, int64_t count) { visit(at, count, 0); });
}

template <typename T, bool RECTIFY>
struct Input {
  const T* x;
  const float* pre_bias;

  POLYCOM_INLINE Floats operator()(int64_t column, int64_t count) const {
    Floats u = load(x + column, count);
    if (pre_bias) u += load(pre_bias + column, count);
    return RECTIFY ? rectified(u) : u;
  }
};

struct RowParameters {
  const float* weight;
  float bias;
  const float* pre_bias;
  float row_scale;
};

inline RowParameters row_parameters(const Parameters& all, const Problem& problem, int64_t row) {
  const int expert = all.ends ? expert_of_row(all.ends, all.experts, row) : 0;
  const int64_t bias_row = all.pre_bias_per_expert ? expert : 0;
  return {all.weight + int64_t(expert) * problem.order, all.bias[expert],
          all.pre_bias ? all.pre_bias + bias_row * problem.width : nullptr,
          all.row_scale ? all.row_scale[row] : 1.0f};
}

template <int N>
inline void flush(Floats (&accumulators)[UNROLL][N], double (&sums)[N]) {
  for (int i = 0; i < N; ++i) {
    Floats sum = accumulators[0][i];
    for (int64_t k = 1; k < UNROLL; ++k) sum += accumulators[k][i];
    sums[i] += horizontal_sum(sum);
    for (int64_t k = 0; k < UNROLL; ++k) accumulators[k][i] = Floats{};
  }
}

template <int R, typename Read>
inline void power_sums(const Read& read, int64_t width, float unit, float (&result)[R]) {
  double sums[R] = {};
  for (int64_t begin = 0; begin < width; begin += BLOCK) {
    const int64_t end = begin + BLOCK < width ? begin + BLOCK : width;
    Floats accumulators[UNROLL][R] = {};
    for_each_vector_unrolled(begin, end, [&](int64_t column, int64_t count, int64_t k) {
      add_powers<R>(read(column, count) * unit, accumulators[k]);
    });
    flush(accumulators, sums);
  }
  for (int i = 0; i < R; ++i) result[i] = float(sums[i]);
}

template <typename Read>
inline float maximum_magnitude(const Read& read, int64_t width) {
  Floats maximum = {};
  for_each_vector(0, width, [&](int64_t column, int64_t count) {
    const Floats u = read(column, count);
    const Floats magnitude = u < 0.0f ? -u : u;
    maximum = maximum < magnitude ? magnitude : maximum;
  });
  float result = 0.0f;
  for (int lane = 0; lane < LANES; ++lane) result = result < maximum[lane] ? maximum[lane] : result;
  return result;
}

// Sums of (u / 2^exponent)^(2i); exponent is 0 unless a sum would overflow.
template <int R, typename Read>
inline int safe_power_sums(const Read& read, int64_t width, float (&sums)[R]) {
  power_sums<R>(read, width, 1.0f, sums);
  if (all_finite(sums)) return 0;
  const int exponent = range_exponent(maximum_magnitude(read, width));
  power_sums<R>(read, width, power_of_two(-exponent), sums);
  return exponent;
}

template <typename T, int R, bool RECTIFY>
void forward_rows(const ForwardArguments& arguments, int64_t first_row, int64_t last_row) {
  const Problem& problem = arguments.problem;
  const int64_t width = problem.width;
  for (int64_t row = first_row; row < last_row; ++row) {
    const RowParameters parameters = row_parameters(arguments.parameters, problem, row);
    const Input<T, RECTIFY> read{static_cast<const T*>(arguments.x) + row * width, parameters.pre_bias};
    float kept_here[R];
    float* kept = arguments.scales ? arguments.scales + row * R : kept_here;
    RowScales<R> scales = no_scales<R>();
    if (problem.step == Step::APPLY) {
      scales = scales_from_total<R>(arguments.power_sums + row * R, problem.inverse_width, problem.eps, kept);
    } else if (problem.normalize) {
      float sums[R];
      const int exponent = safe_power_sums<R>(read, width, sums);
      if (problem.step == Step::REDUCE) {
        for (int i = 0; i < R; ++i) arguments.power_sums[row * R + i] = unscaled_sum(sums[i], exponent, i + 1);
        continue;
      }
      scales = scales_from_sums<R>(sums, exponent, problem.inverse_width, problem.eps, kept);
    }
    const Evaluation<R> evaluate(parameters.weight, parameters.bias, parameters.row_scale, scales);
    T* y = static_cast<T*>(arguments.y) + row * width;
    for_each_vector(0, width, [&](int64_t column, int64_t count) {
      store(y + column, evaluate(read(column, count) * scales.sigma), count);
    });
  }
}

// <g, t_i> for i = 0..R
template <int R, typename Read, typename T>
inline void row_dots(const Read& read, const T* grad_y, int64_t width, const RowScales<R>& scales, float* dots) {
  double sums[R + 1] = {};
  for (int64_t begin = 0; begin < width; begin += BLOCK) {
    const int64_t end = begin + BLOCK < width ? begin + BLOCK : width;
    Floats accumulators[UNROLL][R + 1] = {};
    for_each_vector_unrolled(begin, end, [&](int64_t column, int64_t count, int64_t k) {
      add_dots<R>(load(grad_y + column, count), read(column, count) * scales.sigma, accumulators[k]);
    });
    flush(accumulators, sums);
  }
  dots[0] = float(sums[0]);
  for (int i = 1; i <= R; ++i) dots[i] = float(sums[i]) * scales.s[i - 1];
}

template <typename T, int R, bool RECTIFY, bool NORMALIZE>
void backward_rows(const BackwardArguments& arguments, int64_t first_row, int64_t last_row) {
  const Problem& problem = arguments.problem;
  const int64_t width = problem.width;
  for (int64_t row = first_row; row < last_row; ++row) {
    const RowParameters parameters = row_parameters(arguments.parameters, problem, row);
    const Input<T, false> read{static_cast<const T*>(arguments.x) + row * width, parameters.pre_bias};
    const Input<T, RECTIFY> read_rectified{read.x, read.pre_bias};
    const T* grad_y = static_cast<const T*>(arguments.grad_y) + row * width;
    const RowScales<R> scales = NORMALIZE ? scales_from_kept<R>(arguments.scales + row * R) : no_scales<R>();
    float* dots = arguments.dots + row * (R + 1);
    if (problem.step != Step::APPLY) row_dots<R>(read_rectified, grad_y, width, scales, dots);
    if (problem.step == Step::REDUCE) continue;
    if (arguments.grad_row_scale) {
      arguments.grad_row_scale[row] = row_scale_gradient<R>(parameters.weight, parameters.bias, dots);
    }
    const Gradient<R> gradient(parameters.weight, parameters.row_scale, scales, dots,
                               problem.inverse_width);
    T* grad_x = static_cast<T*>(arguments.grad_x) + row * width;
    for_each_vector(0, width, [&](int64_t column, int64_t count) {
      const Floats u = read(column, count);
      const Floats v = (RECTIFY ? rectified(u) : u) * scales.sigma;
      Floats grad = gradient.slope(v) * load(grad_y + column, count);
      if (NORMALIZE) grad -= gradient.projection(v);
      store(grad_x + column, RECTIFY ? (u > 0.0f ? grad : Floats{}) : grad, count);
    });
    if (arguments.y) {
      const Evaluation<R> evaluate(parameters.weight, parameters.bias, parameters.row_scale, scales);
      T* y = static_cast<T*>(arguments.y) + row * width;
      for_each_vector(0, width, [&](int64_t column, int64_t count) {
        store(y + column, evaluate(read_rectified(column, count) * scales.sigma), count);
      });
    }
  }
}

template <typename T, int R>
void forward_of_order(const ForwardArguments& arguments, int64_t begin, int64_t end) {
  if (arguments.problem.rectify) return forward_rows<T, R, true>(arguments, begin, end);
  return forward_rows<T, R, false>(arguments, begin, end);
}

template <typename T, int R>
void backward_of_order(const BackwardArguments& arguments, int64_t begin, int64_t end) {
  const Problem& problem = arguments.problem;
  if (!problem.normalize) return backward_rows<T, R, true, false>(arguments, begin, end);
  if (problem.rectify) return backward_rows<T, R, true, true>(arguments, begin, end);
  return backward_rows<T, R, false, true>(arguments, begin, end);
}

template <typename T>
void forward_of_type(const ForwardArguments& arguments, int64_t begin, int64_t end) {
  switch (arguments.problem.order) {
    case 1: return forward_of_order<T, 1>(arguments, begin, end);
    case 2: return forward_of_order<T, 2>(arguments, begin, end);
    case 3: return forward_of_order<T, 3>(arguments, begin, end);
    default: return forward_of_order<T, 4>(arguments, begin, end);
  }
}

template <typename T>
void backward_of_type(const BackwardArguments& arguments, int64_t begin, int64_t end) {
  switch (arguments.problem.order) {
    case 1: return backward_of_order<T, 1>(arguments, begin, end);
    case 2: return backward_of_order<T, 2>(arguments, begin, end);
    case 3: return backward_of_order<T, 3>(arguments, begin, end);
    default: return backward_of_order<T, 4>(arguments, begin, end);
  }
}

}  // namespace

namespace POLYCOM_ISA {

void forward(const ForwardArguments& arguments, int64_t begin, int64_t end) {
  switch (arguments.problem.storage) {
    case Storage::FLOAT: return forward_of_type<float>(arguments, begin, end);
    case Storage::BFLOAT16: return forward_of_type<BFloat16>(arguments, begin, end);
    case Storage::HALF: return forward_of_type<Half>(arguments, begin, end);
  }
}

void backward(const BackwardArguments& arguments, int64_t begin, int64_t end) {
  switch (arguments.problem.storage) {
    case Storage::FLOAT: return backward_of_type<float>(arguments, begin, end);
    case Storage::BFLOAT16: return backward_of_type<BFloat16>(arguments, begin, end);
    case Storage::HALF: return backward_of_type<Half>(arguments, begin, end);
  }
}

}  // namespace POLYCOM_ISA
}  // namespace polycom
