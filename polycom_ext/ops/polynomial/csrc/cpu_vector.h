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

// Elements that are worked on together, in two vectors. Which element is where depends on the storage type.
constexpr int CHUNK = 2 * LANES;

struct Chunk {
  Floats part[2];
};

// Floats: the first half, then the second.
inline Chunk load(const float* from) {
  return {load_unaligned<Floats>(from), load_unaligned<Floats>(from + LANES)};
}

inline void store(float* to, const Chunk& chunk) { memcpy(to, &chunk, sizeof chunk); }

// 16-bit types without a conversion instruction: every word holds an element of each part, the even one in its low
// half. Neither way needs a shuffle.
inline Chunk load(const BFloat16* from) {
  const Words words = load_unaligned<Words>(from);
  return {reinterpret_cast<Floats>(words << 16), reinterpret_cast<Floats>(words & 0xffff0000u)};
}

// In the high half of each word, rounded to nearest even; a NaN stays one, as arithmetic has made it a quiet one.
inline Words rounded_to_bfloat16(Floats values) {
  const Words bits = reinterpret_cast<Words>(values);
  return values == values ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits;
}

inline void store(BFloat16* to, const Chunk& chunk) {
  const Words low = rounded_to_bfloat16(chunk.part[0]) >> 16;
  const Words words = low | (rounded_to_bfloat16(chunk.part[1]) & 0xffff0000u);
  memcpy(to, &words, sizeof words);
}

#if defined(__F16C__)
#if defined(__AVX512F__)
inline Floats widened(const Half* from) {
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(load_unaligned<__m256i>(from)));
}
inline __m256i narrowed(Floats values) {
  return _mm512_cvtps_ph(reinterpret_cast<__m512>(values), _MM_FROUND_TO_NEAREST_INT);
}
#else
inline Floats widened(const Half* from) {
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(load_unaligned<__m128i>(from)));
}
inline __m128i narrowed(Floats values) {
  return _mm256_cvtps_ph(reinterpret_cast<__m256>(values), _MM_FROUND_TO_NEAREST_INT);
}
#endif
inline Chunk load(const Half* from) { return {widened(from), widened(from + LANES)}; }
inline void store(Half* to, const Chunk& chunk) {
  for (int k = 0; k < 2; ++k) {
    const auto halves = narrowed(chunk.part[k]);
    memcpy(to + k * LANES, &halves, sizeof halves);
  }
}
#else
#define POLYCOM_HALVES_INTERLEAVED
// Exact scalings by powers of two move between the two exponent ranges. In the low half of each word.
inline Floats widened_half(Words half) {
  const Words magnitude = half & 0x7fffu;
  const Floats normal = reinterpret_cast<Floats>((magnitude << 13) + (112u << 23));
  const Floats denormal = __builtin_convertvector(magnitude, Floats) * 0x1p-24f;
  const Words infinite = (magnitude << 13) | 0x7f800000u;
  Words bits = reinterpret_cast<Words>(magnitude < 0x400u ? denormal : normal);
  bits = magnitude >= 0x7c00u ? infinite : bits;
  return reinterpret_cast<Floats>(bits | ((half & 0x8000u) << 16));
}
inline Words rounded_to_half(Floats values) {
  const Words bits = reinterpret_cast<Words>(values);
  const Words magnitude = bits & 0x7fffffffu;
  const Words normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const Floats shifted = reinterpret_cast<Floats>(magnitude) + 0.5f;  // rounds to a multiple of 2^-24
  const Words denormal = reinterpret_cast<Words>(shifted) - (126u << 23);
  Words half = magnitude < (113u << 23) ? denormal : normal;
  half = magnitude >= 0x477ff000u ? Words{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Words{} + 0x7e00u : half;
  return half | ((bits >> 16) & 0x8000u);
}
inline Chunk load(const Half* from) {
  const Words words = load_unaligned<Words>(from);
  return {widened_half(words & 0xffffu), widened_half(words >> 16)};
}
inline void store(Half* to, const Chunk& chunk) {
  const Words words = rounded_to_half(chunk.part[0]) | (rounded_to_half(chunk.part[1]) << 16);
  memcpy(to, &words, sizeof words);
}
#endif

template <typename T>
constexpr bool INTERLEAVED = false;
template <>
constexpr bool INTERLEAVED<BFloat16> = true;
#ifdef POLYCOM_HALVES_INTERLEAVED
template <>
constexpr bool INTERLEAVED<Half> = true;
#endif

// The last, incomplete chunk of a row: absent elements are zero.
template <typename T>
inline Chunk load(const T* from, int64_t count) {
  if (count >= CHUNK) return load(from);
  T padded[CHUNK] = {};
  memcpy(padded, from, size_t(count) * sizeof(T));
  return load(padded);
}

template <typename T>
inline void store(T* to, const Chunk& chunk, int64_t count) {
  if (count >= CHUNK) return store(to, chunk);
  T padded[CHUNK];
  store(padded, chunk);
  memcpy(to, padded, size_t(count) * sizeof(T));
}

// Floats that belong to elements of type T, in the places that load gives to those.
template <typename T>
inline Chunk load_beside(const float* from, int64_t count) {
  const Chunk chunk = load(from, count);
  if (!INTERLEAVED<T>) return chunk;
  Chunk apart;
  for (int lane = 0; lane < LANES; ++lane) {
    for (int k = 0; k < 2; ++k) {
      const int element = 2 * lane + k;
      apart.part[k][lane] = chunk.part[element / LANES][element % LANES];
    }
  }
  return apart;
}

// A float sum, by halves.
inline float horizontal_sum(Floats values) {
  float lanes[LANES];
  memcpy(lanes, &values, sizeof values);
#pragma GCC unroll 8
  for (int half = LANES / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

}  // namespace
}  // namespace polycom
