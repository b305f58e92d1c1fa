// The scalar mathematics of the activations: one source for the CPU and the CUDA kernels.
//
// With u = x or ReLU(x), the row's y = sum_i a_i t_i + a_0, t_i = u^i / rms(u^i) (or u^i, not normalised).
// Every row has a power of two sigma <= 1 near 1/rms(u), so that v = sigma * u is of moderate size and
// t_i = s_i v^i with s_i = 1 / rms(v^i): no power of a large u is ever formed. A row keeps R floats for
// backward: 1/rms(u), which also determines sigma, and s_2, ..., s_R.
//
// Value is float, or a vector of floats in the CPU kernels. Everything here has internal linkage, because
// the CPU kernels are compiled once per instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define POLYCOM_INLINE __device__ __forceinline__
#else
#define POLYCOM_INLINE inline __attribute__((always_inline))
#endif

namespace polycom {
namespace {

constexpr int MAX_ORDER = 4;

POLYCOM_INLINE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

POLYCOM_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

POLYCOM_INLINE float inverse_sqrt(float value) {
#ifdef __CUDA_ARCH__
  return rsqrtf(value);
#else
  return 1.0f / sqrtf(value);
#endif
}

// 2^exponent for exponents of normal numbers, -126 to 127.
POLYCOM_INLINE float power_of_two(int exponent) { return float_of_bits(uint32_t(exponent + 127) << 23); }

// The largest power of two that is at most value, within [2^-126, 1]; 1 for NaN and infinity.
POLYCOM_INLINE float power_of_two_below(float value) {
  const float power = float_of_bits(bits_of_float(value) & 0x7f800000u);
  return power > 1.0f ? 1.0f : power < power_of_two(-126) ? power_of_two(-126) : power;
}

// 1 / power for powers of two within [2^-126, 2^126], without a division.
POLYCOM_INLINE float inverse_power_of_two(float power) { return float_of_bits((254u << 23) - bits_of_float(power)); }

// The exponent e in [0, 126] of the division by 2^e that makes |u| <= maximum at most 2 (4 above 2^127).
POLYCOM_INLINE int range_exponent(float maximum) {
  const int exponent = int(bits_of_float(maximum) >> 23 & 0xff) - 127;
  return exponent < 0 ? 0 : exponent > 126 ? 126 : exponent;
}

POLYCOM_INLINE bool is_finite(float value) { return (bits_of_float(value) & 0x7f800000u) != 0x7f800000u; }

template <int R>
POLYCOM_INLINE bool all_finite(const float (&values)[R]) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < R; ++i) finite = finite && is_finite(values[i]);
  return finite;
}

// ReLU that keeps NaN.
template <typename Value>
POLYCOM_INLINE Value rectified(Value x) {
  return x < Value{} ? Value{} : x;
}

template <int R>
struct RowScales {
  float sigma;
  float s[R];
};

template <int R>
POLYCOM_INLINE RowScales<R> no_scales() {
  RowScales<R> scales;
  scales.sigma = 1.0f;
#pragma unroll
  for (int i = 0; i < R; ++i) scales.s[i] = 1.0f;
  return scales;
}

// The scales of a row from sums[i-1] = sum (u / 2^exponent)^(2i); writes the R numbers kept for backward.
// Multiplications by powers of two are exact, and go step by step so that none leaves float's range.
template <int R>
POLYCOM_INLINE RowScales<R> scales_from_sums(const float (&sums)[R], int exponent, float inverse_width, float eps,
                                             float* kept) {
  const float shrink = power_of_two(-exponent);
  const float first = inverse_sqrt(sums[0] * inverse_width + eps * shrink * shrink) * shrink;
  RowScales<R> scales;
  scales.sigma = power_of_two_below(first);
  scales.s[0] = first * inverse_power_of_two(scales.sigma);
  kept[0] = first;
  const float ratio = power_of_two(exponent) * scales.sigma;
  float padded = eps * scales.sigma * scales.sigma;
#pragma unroll
  for (int i = 1; i < R; ++i) {
    float mean = sums[i] * inverse_width;
#pragma unroll
    for (int step = 0; step <= i; ++step) mean = mean * ratio * ratio;
    padded = padded * scales.sigma * scales.sigma;
    scales.s[i] = inverse_sqrt(mean + padded);
    kept[i] = scales.s[i];
  }
  return scales;
}

// The sums of a sharded row's parts are added as doubles, of u / 2^16: the eighth power of any float, times any width,
// is then within double's range, and so is that of any u whose square is not lost beside eps.
constexpr int SHARD_EXPONENT = 16;

// The same from double sums of the whole row, all-reduced over a sharded row.
template <int R>
POLYCOM_INLINE RowScales<R> scales_from_total(const double* total, float inverse_width, float eps, float* kept) {
  uint64_t bits;
  memcpy(&bits, total, sizeof bits);
  int exponent = int(bits >> 52) - 1022 + 2 * SHARD_EXPONENT;  // sum u^2 < 2^exponent
  exponent = exponent <= 0 ? 0 : exponent > 252 ? 126 : (exponent + 1) / 2;
  const double unit = double(power_of_two(SHARD_EXPONENT - exponent));
  const double shrink = unit * unit;
  float sums[R];
  double factor = 1.0;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    factor *= shrink;
    sums[i] = float(total[i] * factor);
  }
  return scales_from_sums<R>(sums, exponent, inverse_width, eps, kept);
}

// sums[i-1] of u / 2^exponent as the number that scales_from_total takes.
POLYCOM_INLINE double unscaled_sum(double sum, int exponent, int power) {
  const double unit = double(power_of_two(exponent - SHARD_EXPONENT));
  const double square = unit * unit;
  for (int i = 0; i < power; ++i) sum *= square;
  return sum;
}

template <int R>
POLYCOM_INLINE RowScales<R> scales_from_kept(const float* kept) {
  RowScales<R> scales;
  scales.sigma = power_of_two_below(kept[0]);
  scales.s[0] = kept[0] * inverse_power_of_two(scales.sigma);
#pragma unroll
  for (int i = 1; i < R; ++i) scales.s[i] = kept[i];
  return scales;
}

// sums[i-1] += u^(2i)
template <int R, typename Value>
POLYCOM_INLINE void add_powers(Value u, Value (&sums)[R]) {
  const Value square = u * u;
  Value power = square;
  sums[0] += power;
#pragma unroll
  for (int i = 1; i < R; ++i) {
    power = power * square;
    sums[i] += power;
  }
}

// dots[i] += g v^i for i = 0..R
template <int R, typename Value>
POLYCOM_INLINE void add_dots(Value g, Value v, Value (&dots)[R + 1]) {
  dots[0] += g;
#pragma unroll
  for (int i = 1; i <= R; ++i) {
    g = g * v;
    dots[i] += g;
  }
}

// y as a polynomial in v; the weight of the row (a router's probability) is folded into its coefficients.
template <int R>
struct Evaluation {
  float c[R + 1];

  POLYCOM_INLINE Evaluation(const float* weight, float bias, float row_scale, const RowScales<R>& scales) {
    c[0] = row_scale * bias;
#pragma unroll
    for (int i = 1; i <= R; ++i) c[i] = row_scale * weight[R - i] * scales.s[i - 1];
  }

  template <typename Value>
  POLYCOM_INLINE Value operator()(Value v) const {
    Value y = v * c[R] + c[R - 1];
#pragma unroll
    for (int i = R - 2; i >= 0; --i) y = y * v + c[i];
    return y;
  }
};

// dy/dx applied to g: sum_i i a_i s_i sigma v^(i-1) (g - t_i <g, t_i> / width), as g P(v) - v Q(v^2).
template <int R>
struct Gradient {
  float p[R];
  float q[R];

  // dots[i] = <g, t_i>, i = 0..R
  POLYCOM_INLINE Gradient(const float* weight, float row_scale, const RowScales<R>& scales, const float* dots,
                          float inverse_width) {
#pragma unroll
    for (int i = 1; i <= R; ++i) {
      const float s = scales.s[i - 1];
      p[i - 1] = row_scale * scales.sigma * (float(i) * weight[R - i] * s);
      q[i - 1] = p[i - 1] * s * (dots[i] * inverse_width);
    }
  }

  template <typename Value>
  POLYCOM_INLINE Value slope(Value v) const {
    if constexpr (R == 1) return Value{} + p[0];
    Value sum = v * p[R - 1] + p[R > 1 ? R - 2 : 0];
#pragma unroll
    for (int i = R - 3; i >= 0; --i) sum = sum * v + p[i];
    return sum;
  }

  template <typename Value>
  POLYCOM_INLINE Value projection(Value v) const {
    if constexpr (R == 1) return v * q[0];
    const Value square = v * v;
    Value sum = square * q[R - 1] + q[R > 1 ? R - 2 : 0];
#pragma unroll
    for (int i = R - 3; i >= 0; --i) sum = sum * square + q[i];
    return sum * v;
  }
};

// d(row_scale): the polynomial without its row's weight, applied to g; dots as above.
template <int R>
POLYCOM_INLINE float row_scale_gradient(const float* weight, float bias, const float* dots) {
  float sum = bias * dots[0];
#pragma unroll
  for (int i = 1; i <= R; ++i) sum += weight[R - i] * dots[i];
  return sum;
}

// The set of coefficients of a row: the first expert whose rows end beyond it; `experts` for rows past all, which are
// nobody's: everything written for them is zero, and nothing that they hold is looked at.
POLYCOM_INLINE int expert_of_row(const int32_t* ends, int experts, int64_t row) {
  int low = 0, high = experts;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ends[middle] > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace
}  // namespace polycom
