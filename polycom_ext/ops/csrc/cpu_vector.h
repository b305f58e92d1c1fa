// Vectors of floats (GCC and Clang vector extensions), loaded from and stored to every storage type.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace polycom {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Mask __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <typename Vector>
inline Vector load_unaligned(const void* from) {
  Vector vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}

inline Floats load(const float* from) { return load_unaligned<Floats>(from); }

inline void store(float* to, Floats values) { memcpy(to, &values, sizeof values); }

inline Floats load(const BFloat16* from) {
  const Words bits = __builtin_convertvector(load_unaligned<Halves>(from), Words) << 16;
  return reinterpret_cast<Floats>(bits);
}

// Round to nearest even; a NaN stays one.
inline void store(BFloat16* to, Floats values) {
  const Words bits = reinterpret_cast<Words>(values);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;
  const Halves halves = __builtin_convertvector(values == values ? rounded : quiet, Halves);
  memcpy(to, &halves, sizeof halves);
}

#if defined(__F16C__) && defined(__AVX512F__)
inline Floats load(const Half* from) {
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(load_unaligned<__m256i>(from)));
}
inline void store(Half* to, Floats values) {
  const __m256i halves = _mm512_cvtps_ph(reinterpret_cast<__m512>(values), _MM_FROUND_TO_NEAREST_INT);
  memcpy(to, &halves, sizeof halves);
}
#elif defined(__F16C__)
inline Floats load(const Half* from) {
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(load_unaligned<__m128i>(from)));
}
inline void store(Half* to, Floats values) {
  const __m128i halves = _mm256_cvtps_ph(reinterpret_cast<__m256>(values), _MM_FROUND_TO_NEAREST_INT);
  memcpy(to, &halves, sizeof halves);
}
#else
// Without a conversion instruction: exact scalings by powers of two move between the two exponent ranges.
inline Floats load(const Half* from) {
  const Words half = __builtin_convertvector(load_unaligned<Halves>(from), Words);
  const Words magnitude = half & 0x7fffu;
  const Floats normal = reinterpret_cast<Floats>((magnitude << 13) + (112u << 23));
  const Floats denormal = __builtin_convertvector(magnitude, Floats) * 0x1p-24f;
  const Words infinite = (magnitude << 13) | 0x7f800000u;
  Words bits = reinterpret_cast<Words>(magnitude < 0x400u ? denormal : normal);
  bits = magnitude >= 0x7c00u ? infinite : bits;
  return reinterpret_cast<Floats>(bits | ((half & 0x8000u) << 16));
}
inline void store(Half* to, Floats values) {
  const Words bits = reinterpret_cast<Words>(values);
  const Words magnitude = bits & 0x7fffffffu;
  const Words normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const Floats shifted = reinterpret_cast<Floats>(magnitude) + 0.5f;  // rounds to a multiple of 2^-24
  const Words denormal = reinterpret_cast<Words>(shifted) - (126u << 23);
  Words half = magnitude < (113u << 23) ? denormal : normal;
  half = magnitude >= 0x477ff000u ? Words{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Words{} + 0x7e00u : half;
  const Halves halves = __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Halves);
  memcpy(to, &halves, sizeof halves);
}
#endif

// The last, incomplete vector of a row: absent lanes are zero.
template <typename T>
inline Floats load(const T* from, int64_t count) {
  if (count >= LANES) return load(from);
  T padded[LANES] = {};
  memcpy(padded, from, size_t(count) * sizeof(T));
  return load(padded);
}

template <typename T>
inline void store(T* to, Floats values, int64_t count) {
  if (count >= LANES) return store(to, values);
  T padded[LANES];
  store(padded, values);
  memcpy(to, padded, size_t(count) * sizeof(T));
}

inline double horizontal_sum(Floats values) {
  double sum = 0.0;
  for (int lane = 0; lane < LANES; ++lane) sum += double(values[lane]);
  return sum;
}

}  // namespace
}  // namespace polycom
