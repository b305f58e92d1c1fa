// The CPU kernels. Compiled several times, with POLYCOM_ISA naming the instruction set that the flags allow.
// A row is read twice, the second time from cache. Meanwhile the memory works ahead: the first reading fetches the
// lines that the second will write, and the second fetches the row after this one.
//
// Nothing with external linkage is instantiated but the two entry points, so no code of a newer instruction set can
// be linked into an older one's path.
#include "cpu_kernels.h"
#include "cpu_vector.h"
#include "polynomial.h"

namespace polycom {
namespace {

constexpr int64_t BLOCK = 4096;  // elements summed in float before the sum goes on in double

// Calls visit(column, count) for whole chunks, and once more for what is left.
template <typename Visit>
POLYCOM_INLINE void for_each_chunk(int64_t begin, int64_t end, Visit visit) {
  int64_t column = begin;
  for (; column + CHUNK <= end; column += CHUNK) visit(column, int64_t(CHUNK));
  if (column < end) visit(column, end - column);
}

// Asks for a chunk's cache lines, into the second level. After a row's end they may lie beyond the tensor.
template <typename T>
POLYCOM_INLINE void prefetch(const T* from) {
  constexpr int64_t LINE = 64, BYTES = CHUNK * sizeof(T);
  for (int64_t at = 0; at < BYTES; at += LINE) __builtin_prefetch(reinterpret_cast<const char*>(from) + at, 0, 2);
}

// function(part, ...) of the same part of each chunk.
template <typename Function, typename... Chunks>
POLYCOM_INLINE Chunk map(Function function, const Chunks&... chunks) {
  return {function(chunks.part[0]...), function(chunks.part[1]...)};
}

template <typename T, bool RECTIFY>
struct Input {
  const T* x;
  const float* pre_bias;

  POLYCOM_INLINE Chunk operator()(int64_t column, int64_t count) const {
    Chunk chunk = load(x + column, count);
    if (pre_bias) {
      const Chunk added = load_beside<T>(pre_bias + column, count);
      for (int k = 0; k < 2; ++k) chunk.part[k] += added.part[k];
    }
    return RECTIFY ? map([](Floats u) { return rectified(u); }, chunk) : chunk;
  }
};

struct RowParameters {
  const float* weight;
  float bias;
  const float* pre_bias;
  float row_scale;
};

inline int owner(const Parameters& all, int64_t row) { return all.ends ? expert_of_row(all.ends, all.experts, row) : 0; }

inline RowParameters row_parameters(const Parameters& all, const Problem& problem, int64_t row, int expert) {
  const int64_t bias_row = all.pre_bias_per_expert ? expert : 0;
  return {all.weight + int64_t(expert) * problem.order, all.bias[expert],
          all.pre_bias ? all.pre_bias + bias_row * problem.width : nullptr,
          all.row_scale ? all.row_scale[row] : 1.0f};
}

// Zeros in row `row` of a result, unless it is null.
template <typename T>
inline void clear_row(T* result, int64_t row, int64_t columns) {
  if (result) memset(result + row * columns, 0, size_t(columns) * sizeof(T));
}

// Sums over a row of what visit(column, count, accumulators) adds to a set of accumulators for each part of a chunk.
template <int N, typename Visit>
POLYCOM_INLINE void sum_row(int64_t width, float (&result)[N], Visit visit) {
  double sums[N] = {};
  for (int64_t begin = 0; begin < width; begin += BLOCK) {
    const int64_t end = begin + BLOCK < width ? begin + BLOCK : width;
    Floats accumulators[2][N] = {};
    for_each_chunk(begin, end, [&](int64_t column, int64_t count) { visit(column, count, accumulators); });
    for (int i = 0; i < N; ++i) sums[i] += double(horizontal_sum(accumulators[0][i] + accumulators[1][i]));
  }
  for (int i = 0; i < N; ++i) result[i] = float(sums[i]);
}

template <int R, typename Read>
inline void power_sums(const Read& read, int64_t width, float (&sums)[R]) {
  sum_row<R>(width, sums, [&](int64_t column, int64_t count, Floats(&accumulators)[2][R]) {
    const Chunk u = read(column, count);
    for (int k = 0; k < 2; ++k) add_powers<R>(u.part[k], accumulators[k]);
  });
}

template <typename Read>
inline float maximum_magnitude(const Read& read, int64_t width) {
  Floats maximum = {};
  for_each_chunk(0, width, [&](int64_t column, int64_t count) {
    const Chunk u = read(column, count);
    for (int k = 0; k < 2; ++k) {
      const Floats magnitude = u.part[k] < 0.0f ? -u.part[k] : u.part[k];
      maximum = maximum < magnitude ? magnitude : maximum;
    }
  });
  float result = 0.0f;
  for (int lane = 0; lane < LANES; ++lane) result = result < maximum[lane] ? maximum[lane] : result;
  return result;
}

// Sums of (u / 2^exponent)^(2i); exponent is 0 unless a sum would overflow.
template <int R, typename Read>
inline int safe_power_sums(const Read& read, int64_t width, float (&sums)[R]) {
  power_sums<R>(read, width, sums);
  if (all_finite(sums)) return 0;
  const int exponent = range_exponent(maximum_magnitude(read, width));
  const float unit = power_of_two(-exponent);
  const auto scaled = [&](int64_t column, int64_t count) {
    return map([&](Floats u) { return u * unit; }, read(column, count));
  };
  power_sums<R>(scaled, width, sums);
  return exponent;
}

template <typename T, int R, bool RECTIFY>
void forward_rows(const ForwardArguments& arguments, int64_t first_row, int64_t last_row) {
  const Problem& problem = arguments.problem;
  const int64_t width = problem.width;
  for (int64_t row = first_row; row < last_row; ++row) {
    const int expert = owner(arguments.parameters, row);
    if (expert == arguments.parameters.experts) {
      clear_row(static_cast<T*>(arguments.y), row, width);
      clear_row(arguments.scales, row, R);
      if (problem.step == Step::REDUCE) clear_row(arguments.power_sums, row, R);
      continue;
    }
    const RowParameters parameters = row_parameters(arguments.parameters, problem, row, expert);
    const Input<T, RECTIFY> read{static_cast<const T*>(arguments.x) + row * width, parameters.pre_bias};
    const int64_t next = row + 1 < last_row ? width : 0;
    T* y = arguments.y ? static_cast<T*>(arguments.y) + row * width : nullptr;
    float kept_here[R];
    float* kept = arguments.scales ? arguments.scales + row * R : kept_here;
    RowScales<R> scales = no_scales<R>();
    if (problem.step == Step::APPLY) {
      scales = scales_from_total<R>(arguments.power_sums + row * R, problem.inverse_width, problem.eps, kept);
    } else if (problem.normalize) {
      const auto read_ahead = [&](int64_t column, int64_t count) {
        if (y) prefetch(y + column);
        return read(column, count);
      };
      float sums[R];
      const int exponent = safe_power_sums<R>(read_ahead, width, sums);
      if (problem.step == Step::REDUCE) {
        for (int i = 0; i < R; ++i) arguments.power_sums[row * R + i] = unscaled_sum(sums[i], exponent, i + 1);
        continue;
      }
      scales = scales_from_sums<R>(sums, exponent, problem.inverse_width, problem.eps, kept);
    }
    const Evaluation<R> evaluate(parameters.weight, parameters.bias, parameters.row_scale, scales);
    const auto function = [&](Floats u) { return evaluate(u * scales.sigma); };
    for_each_chunk(0, width, [&](int64_t column, int64_t count) {
      prefetch(read.x + next + column);
      store(y + column, map(function, read(column, count)), count);
    });
  }
}

// <g, t_i> for i = 0..R; `ahead` is what will be written next, or null.
template <int R, typename Read, typename T>
inline void row_dots(const Read& read, const T* grad_y, int64_t width, const RowScales<R>& scales,
                     const T* ahead, float (&dots)[R + 1]) {
  sum_row<R + 1>(width, dots, [&](int64_t column, int64_t count, Floats(&accumulators)[2][R + 1]) {
    const Chunk u = read(column, count), g = load(grad_y + column, count);
    if (ahead) prefetch(ahead + column);
    for (int k = 0; k < 2; ++k) add_dots<R>(g.part[k], u.part[k] * scales.sigma, accumulators[k]);
  });
  for (int i = 1; i <= R; ++i) dots[i] *= scales.s[i - 1];
}

template <typename T, int R, bool RECTIFY, bool NORMALIZE>
void backward_rows(const BackwardArguments& arguments, int64_t first_row, int64_t last_row) {
  const Problem& problem = arguments.problem;
  const int64_t width = problem.width;
  for (int64_t row = first_row; row < last_row; ++row) {
    const int expert = owner(arguments.parameters, row);
    if (expert == arguments.parameters.experts) {
      clear_row(static_cast<T*>(arguments.grad_x), row, width);
      clear_row(static_cast<T*>(arguments.y), row, width);
      clear_row(arguments.grad_row_scale, row, 1);
      if (problem.step != Step::APPLY) clear_row(arguments.dots, row, R + 1);
      continue;
    }
    const RowParameters parameters = row_parameters(arguments.parameters, problem, row, expert);
    const Input<T, false> read{static_cast<const T*>(arguments.x) + row * width, parameters.pre_bias};
    const Input<T, RECTIFY> read_rectified{read.x, read.pre_bias};
    const T* grad_y = static_cast<const T*>(arguments.grad_y) + row * width;
    T* grad_x = arguments.grad_x ? static_cast<T*>(arguments.grad_x) + row * width : nullptr;
    const int64_t next = row + 1 < last_row ? width : 0;
    const RowScales<R> scales = NORMALIZE ? scales_from_kept<R>(arguments.scales + row * R) : no_scales<R>();
    float(&dots)[R + 1] = *reinterpret_cast<float(*)[R + 1]>(arguments.dots + row * (R + 1));
    if (problem.step != Step::APPLY) row_dots<R>(read_rectified, grad_y, width, scales, grad_x, dots);
    if (problem.step == Step::REDUCE) continue;
    if (arguments.grad_row_scale) {
      arguments.grad_row_scale[row] = row_scale_gradient<R>(parameters.weight, parameters.bias, dots);
    }
    const Gradient<R> gradient(parameters.weight, parameters.row_scale, scales, dots,
                               problem.inverse_width);
    const auto slope = [&](Floats u, Floats g) {
      const Floats v = (RECTIFY ? rectified(u) : u) * scales.sigma;
      Floats grad = gradient.slope(v) * g;
      if (NORMALIZE) grad -= gradient.projection(v);
      return RECTIFY ? (u > 0.0f ? grad : Floats{}) : grad;
    };
    for_each_chunk(0, width, [&](int64_t column, int64_t count) {
      prefetch(read.x + next + column);
      prefetch(grad_y + next + column);
      store(grad_x + column, map(slope, read(column, count), load(grad_y + column, count)), count);
    });
    if (arguments.y) {
      const Evaluation<R> evaluate(parameters.weight, parameters.bias, parameters.row_scale, scales);
      const auto function = [&](Floats u) { return evaluate(u * scales.sigma); };
      T* y = static_cast<T*>(arguments.y) + row * width;
      for_each_chunk(0, width, [&](int64_t column, int64_t count) {
        store(y + column, map(function, read_rectified(column, count)), count);
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
