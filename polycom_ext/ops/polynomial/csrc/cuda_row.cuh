// A row on the device: who owns it, how its elements are held, read, summed over and written.
//
// A group of threads owns a row: a warp, or the whole block. With VECTORS > 0 every thread keeps VECTORS sixteen-byte
// pieces of the row in registers, in storage type, so that memory is read once; VECTORS = 0 is the looped path for any
// width and alignment, which reads a row again for each step.
#pragma once

#include <type_traits>

#include "arguments.h"
#include "cuda_storage.cuh"

namespace polycom {
namespace {

constexpr int MAX_WARPS = 32;
constexpr int MAX_SLOTS = 8;  // values of a warp that a reduction exchanges
constexpr int MAX_REDUCTION_BYTES = 2 * MAX_WARPS * MAX_SLOTS * int(sizeof(float));  // of shared memory

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
  int most_warps;  // that hold a row in this kernel, known when it is compiled
  int turn = 0;  // which of two buffers the next reduction takes

  __device__ __forceinline__ Place(int threads_per_row, int most_threads, int64_t width_, int vectors_)
      : lane(int(threadIdx.x) % threads_per_row),
        threads(threads_per_row),
        width(int(width_)),
        vectors(vectors_),
        most_warps(most_threads / WARP) {
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

// values[i] combined over the threads of a row, on every one of them, bitwise the same. Reductions take two buffers in
// turn: between two uses of one lies the other's barrier, so that each needs one only.
template <typename Operation, int N>
__device__ __forceinline__ void reduce_row(float (&values)[N], Place& place) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] = Operation::combine(values[i], __shfl_xor_sync(0xffffffffu, values[i], offset));
    }
  }
  if (place.threads == WARP) return;
  constexpr int SLOTS = N <= 1 ? 1 : N <= 2 ? 2 : N <= 4 ? 4 : MAX_SLOTS;  // a warp's values, to a power of two
  __shared__ float buffers[2][MAX_WARPS * SLOTS];
  float* const buffer = buffers[place.turn];
  place.turn ^= 1;
  const int lane = place.lane % WARP, count = place.threads / WARP * SLOTS;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) buffer[place.lane / WARP * SLOTS + i] = values[i];
  }
  __syncthreads();
  float value = lane < count ? buffer[lane] : 0.0f;  // lane's value is that of slot lane % SLOTS
#pragma unroll
  for (int skip = WARP; skip < place.most_warps * SLOTS; skip += WARP) {
    if (lane + skip < count) value = Operation::combine(value, buffer[lane + skip]);
  }
#pragma unroll
  for (int offset = SLOTS; offset < WARP; offset *= 2) {
    value = Operation::combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = __shfl_sync(0xffffffffu, value, i);
}

// values[lane], where there are so many; for a result of a few columns that neighbouring threads write at once.
template <int N>
__device__ __forceinline__ float of_lane(const float (&values)[N], const Place& place) {
  float value = values[0];
#pragma unroll
  for (int i = 1; i < N; ++i) value = place.lane == i ? values[i] : value;
  return value;
}

// A row's pieces that belong to this thread: in registers, or read again at every use.
template <typename S, int VECTORS>
struct Tile {
  const typename S::Element* row;
  Packed kept[VECTORS > 0 ? VECTORS : 1];

  // From `stage`, where start_row has brought the row: with whatever lies there of vectors that the row does not have.
  __device__ __forceinline__ Tile(const void* base, int64_t index, const Place& place, const Staged& stage)
      : row(static_cast<const typename S::Element*>(base) + index * place.width) {
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) kept[k] = load_staged(stage, k);
  }

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

  // Whether the pieces themselves can be multiplied by a power of two. Not before ReLU, whose gradient asks whether x is
  // positive, however small.
  template <bool RECTIFY, bool BIASED>
  static constexpr bool SCALES = VECTORS > 0 && !RECTIFY && !BIASED && std::is_same_v<S, BFloat16Storage>;

  // Multiplies them, two numbers at a time.
  __device__ __forceinline__ void scale(float sigma) {
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
#pragma unroll
      for (int w = 0; w < 4; ++w) kept[k].word[w] = S::scale(kept[k].word[w], sigma);
    }
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

// This thread's first piece of a row that lies in shared memory `behind` others, VECTORS of each thread.
template <int VECTORS>
__device__ __forceinline__ Staged stage(const Place& place, int behind) {
  const int warp = place.lane / WARP;
  return Staged((behind * place.threads + warp * WARP) * VECTORS + place.lane % WARP);
}

// Starts to bring a row to shared memory: every thread its own pieces, so that no other waits for them.
template <typename S, int VECTORS>
__device__ __forceinline__ void start_row(const void* base, int64_t index, const Place& place, const Staged& stage) {
  const auto* row = reinterpret_cast<const Packed*>(static_cast<const typename S::Element*>(base) + index * place.width);
#pragma unroll
  for (int k = 0; k < VECTORS; ++k) {
    const int vector = place.lane + k * place.threads;
    if (vector < place.vectors) start_copy(stage, k, row + vector);
  }
}

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

  __device__ __forceinline__ RowParameters(const Parameters& all, const Problem& problem, int64_t row, int expert) {
    weight = all.weight + int64_t(expert) * problem.order;
    bias = all.bias[expert];
    pre_bias = all.pre_bias ? all.pre_bias + (all.pre_bias_per_expert ? expert : 0) * problem.width : nullptr;
    row_scale = POLYCOM_UNUSUAL(all.row_scale) ? all.row_scale[row] : 1.0f;
  }
};

__device__ __forceinline__ int owner(const Parameters& all, int64_t row) {
  return POLYCOM_UNUSUAL(all.ends) ? expert_of_row(all.ends, all.experts, row) : 0;
}

template <bool RECTIFY>
__device__ __forceinline__ float rho(float u) {
  return RECTIFY ? rectified(u) : u;
}

// v = sigma u, for u whose tile was multiplied by sigma (SCALED), or was not.
template <bool RECTIFY, bool SCALED>
__device__ __forceinline__ float moderate(float u, float sigma) {
  if constexpr (SCALED) return rho<RECTIFY>(u);
  return rho<RECTIFY>(u) * sigma;
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

// The elements of x, pre_bias added where there is one (BIASED), before ReLU.
template <bool BIASED, typename S, int VECTORS>
__device__ __forceinline__ void inputs(const Tile<S, VECTORS>& x, const RowParameters& parameters, int k, int vector,
                                       float (&u)[PER_VECTOR<S>]) {
  unpack<S>(x.piece(k, vector), u);
  if constexpr (BIASED) {
    const Packed* bias = reinterpret_cast<const Packed*>(parameters.pre_bias) + vector * (PER_VECTOR<S> / 4);
#pragma unroll
    for (int j = 0; j < PER_VECTOR<S> / 4; ++j) {
      float added[4];
      unpack<FloatStorage>(bias[j], added);
#pragma unroll
      for (int i = 0; i < 4; ++i) u[4 * j + i] += added[i];
    }
  }
}

template <bool BIASED, typename S, int VECTORS>
__device__ __forceinline__ float input(const Tile<S, VECTORS>& x, const RowParameters& parameters, int column) {
  const float value = S::load(x.row[column]);
  return BIASED ? value + parameters.pre_bias[column] : value;
}

// Calls visit(u) for each of this thread's elements of the row.
template <bool BIASED, typename S, int VECTORS, typename Visit>
__device__ __forceinline__ void for_each_input(const Tile<S, VECTORS>& x, const RowParameters& parameters,
                                               const Place& place, Visit visit) {
  for_each_vector<VECTORS>(place, [&](int k, int vector) {
    float u[PER_VECTOR<S>];
    inputs<BIASED>(x, parameters, k, vector, u);
#pragma unroll
    for (int i = 0; i < PER_VECTOR<S>; ++i) visit(u[i]);
  });
  for_each_remaining<S, VECTORS>(place, [&](int column) { visit(input<BIASED>(x, parameters, column)); });
}

// The same with the gradient at the element: visit(u, g).
template <bool BIASED, typename S, int VECTORS, typename Visit>
__device__ __forceinline__ void for_each_pair(const Tile<S, VECTORS>& x, const Tile<S, VECTORS>& grad,
                                              const RowParameters& parameters, const Place& place, Visit visit) {
  for_each_vector<VECTORS>(place, [&](int k, int vector) {
    float u[PER_VECTOR<S>], g[PER_VECTOR<S>];
    inputs<BIASED>(x, parameters, k, vector, u);
    unpack<S>(grad.piece(k, vector), g);
#pragma unroll
    for (int i = 0; i < PER_VECTOR<S>; ++i) visit(u[i], g[i]);
  });
  for_each_remaining<S, VECTORS>(place, [&](int column) {
    visit(input<BIASED>(x, parameters, column), S::load(grad.row[column]));
  });
}

template <typename S>
__device__ __forceinline__ typename S::Element* row_of(void* out, int64_t row, const Place& place) {
  return static_cast<typename S::Element*>(out) + row * place.width;
}

// Zeros in a row of a result, unless it is null.
template <typename S, int VECTORS>
__device__ __forceinline__ void clear_row(void* out, int64_t row, const Place& place) {
  if (!out) return;
  auto* elements = row_of<S>(out, row, place);
  for_each_vector<VECTORS>(place, [&](int, int vector) { reinterpret_cast<Packed*>(elements)[vector] = Packed{}; });
  for_each_remaining<S, VECTORS>(place, [&](int column) { elements[column] = typename S::Element(0); });
}

// The same for the columns of a result that are few.
template <int COLUMNS, typename T>
__device__ __forceinline__ void clear_columns(T* out, int64_t row, const Place& place) {
  if (!out || place.lane != 0) return;
  for (int i = 0; i < COLUMNS; ++i) out[row * COLUMNS + i] = T(0);
}

// out = function(u), element by element.
template <bool BIASED, typename S, int VECTORS, typename Function>
__device__ __forceinline__ void write_row(typename S::Element* out, const Tile<S, VECTORS>& x,
                                          const RowParameters& parameters, const Place& place, Function function) {
  for_each_vector<VECTORS>(place, [&](int k, int vector) {
    float u[PER_VECTOR<S>];
    inputs<BIASED>(x, parameters, k, vector, u);
#pragma unroll
    for (int i = 0; i < PER_VECTOR<S>; ++i) u[i] = function(u[i]);
    reinterpret_cast<Packed*>(out)[vector] = pack<S>(u);
  });
  for_each_remaining<S, VECTORS>(place, [&](int column) {
    out[column] = S::narrow(function(input<BIASED>(x, parameters, column)));
  });
}

// out = function(u, g) and, unless null, y = evaluate(u), element by element. In one pass over the pieces, so that each
// is dead after its turn: with the two passes apart, wide rows spill.
template <bool BIASED, typename S, int VECTORS, typename Function, typename Evaluate>
__device__ __forceinline__ void write_rows(typename S::Element* out, typename S::Element* y, const Tile<S, VECTORS>& x,
                                           const Tile<S, VECTORS>& grad, const RowParameters& parameters,
                                           const Place& place, Function function, Evaluate evaluate) {
  for_each_vector<VECTORS>(place, [&](int k, int vector) {
    float u[PER_VECTOR<S>], g[PER_VECTOR<S>];
    inputs<BIASED>(x, parameters, k, vector, u);
    unpack<S>(grad.piece(k, vector), g);
#pragma unroll
    for (int i = 0; i < PER_VECTOR<S>; ++i) g[i] = function(u[i], g[i]);
    reinterpret_cast<Packed*>(out)[vector] = pack<S>(g);
    if (POLYCOM_UNUSUAL(y)) {
#pragma unroll
      for (int i = 0; i < PER_VECTOR<S>; ++i) u[i] = evaluate(u[i]);
      reinterpret_cast<Packed*>(y)[vector] = pack<S>(u);
    }
  });
  for_each_remaining<S, VECTORS>(place, [&](int column) {
    const float u = input<BIASED>(x, parameters, column);
    out[column] = S::narrow(function(u, S::load(grad.row[column])));
    if (y) y[column] = S::narrow(evaluate(u));
  });
}

}  // namespace
}  // namespace polycom
