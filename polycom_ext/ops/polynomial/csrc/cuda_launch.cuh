// Which instance of a kernel serves a problem; the launching itself is the caller's (a stream, or the emulator).
#pragma once

#include "cuda_kernels.cuh"

namespace polycom {
namespace {

constexpr int LOOPED_THREADS = 512;

// How a kernel holds a row: vectors in a thread's registers (none: the looped path), threads of a block at most, the
// blocks of that size that a processor shall hold, so that the loads of one run while another computes (a block of fewer
// threads has more beside it; with a bias before as many as there are without a spill), whether there are instances for
// a bias before, and whether the next row is staged in shared memory.
//
// Rows over 32 KiB with a bias before take the looped path. Instances of the last kind would hold them (no register of
// orders 3 and 4 spills), but few models have both, tensor parallelism narrows their rows, and 48 more kernels an
// architecture would be built and loaded by everybody.
struct Hold {
  int vectors;
  int threads;
  int blocks;
  bool biased;
  bool staged = false;
};

constexpr int asked_blocks(const Hold& hold, bool biased) { return biased ? 1 : hold.blocks; }

// Of shared memory: a row of x and one of y's gradient.
constexpr int staged_bytes(const Hold& hold, int threads) {
  return hold.staged ? 2 * threads * hold.vectors * int(sizeof(Packed)) : 0;
}

constexpr int HOLDS = 5;
constexpr int LOOPED = 0;
// Of each, the first that a row fits is taken. NARROW_THREADS are four rows, a warp each. Rows of up to 64 KiB fit. The
// widest are held by few threads with many registers each: more threads with fewer would spill.
constexpr Hold FORWARD_HOLDS[HOLDS] = {
    {0, LOOPED_THREADS, 1, true}, {4, NARROW_THREADS, 8, false}, {8, NARROW_THREADS, 6, true},
    {8, 256, 3, true},            {16, 256, 2, false},
};
// Two rows, of x and of y's gradient. The widest take half of all registers, which leaves room for one block only, and
// the next ones 128 KiB of shared memory.
constexpr Hold BACKWARD_HOLDS[HOLDS] = {
    {0, LOOPED_THREADS, 1, true}, {4, NARROW_THREADS, 5, false}, {8, NARROW_THREADS, 4, true},
    {8, 256, 2, true, true},      {16, 256, 1, false, true},
};

struct Shape {
  int hold;
  int threads_per_row;
  int threads;
  int vectors;  // whole vectors of a row that are read as such
  int shared;   // bytes of dynamic shared memory
};

inline int round_up(int64_t value, int multiple) { return int((value + multiple - 1) / multiple * multiple); }

// most_shared: bytes of shared memory that a block may have on the device. Where the next row does not fit in them (of the
// widest kind on an RTX 4090 or L40S), the row is looped over.
inline Shape choose_shape(int64_t width, int per_vector, bool aligned, bool biased, const Hold (&holds)[HOLDS],
                          int most_shared) {
  const bool whole = aligned && width % per_vector == 0;
  const int vectors = whole ? int(width / per_vector) : 0;
  for (int at = LOOPED + 1; whole && at < HOLDS; ++at) {
    const Hold& hold = holds[at];
    const bool narrow = hold.threads == NARROW_THREADS;
    if (vectors > hold.vectors * (narrow ? WARP : hold.threads) || (biased && !hold.biased)) continue;
    if (narrow) return {at, WARP, NARROW_THREADS, vectors, 0};
    const int threads = round_up((vectors + hold.vectors - 1) / hold.vectors, WARP);
    const int shared = staged_bytes(hold, threads);
    if (shared > most_shared - MAX_REDUCTION_BYTES) continue;
    return {at, threads, threads, vectors, shared};
  }
  const int threads = width < LOOPED_THREADS ? round_up(width, WARP) : LOOPED_THREADS;
  return {LOOPED, threads, threads, vectors, 0};
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline Shape choose_shape(const ForwardArguments& arguments, int per_vector, int most_shared) {
  const void* const bias = arguments.parameters.pre_bias;
  const bool aligned = is_aligned(arguments.x) && is_aligned(arguments.y) && is_aligned(bias);
  return choose_shape(arguments.problem.width, per_vector, aligned, bias, FORWARD_HOLDS, most_shared);
}

inline Shape choose_shape(const BackwardArguments& arguments, int per_vector, int most_shared) {
  const void* const bias = arguments.parameters.pre_bias;
  const bool aligned = is_aligned(arguments.x) && is_aligned(arguments.grad_y) && is_aligned(arguments.grad_x) &&
                       is_aligned(arguments.y) && is_aligned(bias);
  return choose_shape(arguments.problem.width, per_vector, aligned, bias, BACKWARD_HOLDS, most_shared);
}

template <typename S, int R, bool RECTIFY, bool BIASED, int AT>
constexpr auto instance(const ForwardArguments&) {
  constexpr Hold hold = FORWARD_HOLDS[AT];
  return forward_kernel<S, R, RECTIFY, BIASED, hold.vectors, hold.threads, asked_blocks(hold, BIASED)>;
}

template <typename S, int R, bool RECTIFY, bool BIASED, int AT>
constexpr auto instance(const BackwardArguments&) {
  constexpr Hold hold = BACKWARD_HOLDS[AT];
  return backward_kernel<S, R, RECTIFY, BIASED, hold.vectors, hold.threads, asked_blocks(hold, BIASED), hold.staged>;
}

template <typename S, int R, bool RECTIFY, bool BIASED, int AT = 0, typename Arguments, typename Launch>
void launch_shape(const Arguments& arguments, const Shape& shape, Launch run) {
  static_assert(FORWARD_HOLDS[AT].biased == BACKWARD_HOLDS[AT].biased);
  if constexpr (!BIASED || FORWARD_HOLDS[AT].biased) {
    if (shape.hold == AT) return run(instance<S, R, RECTIFY, BIASED, AT>(arguments), shape, arguments);
  }
  if constexpr (AT + 1 < HOLDS) launch_shape<S, R, RECTIFY, BIASED, AT + 1>(arguments, shape, run);
}

template <typename S, int R, bool RECTIFY, typename Arguments, typename Launch>
void launch_rectified(const Arguments& arguments, int most_shared, Launch run) {
  const Shape shape = choose_shape(arguments, PER_VECTOR<S>, most_shared);
  if (arguments.parameters.pre_bias) return launch_shape<S, R, RECTIFY, true>(arguments, shape, run);
  launch_shape<S, R, RECTIFY, false>(arguments, shape, run);
}

template <typename S, int R, typename Arguments, typename Launch>
void launch_order(const Arguments& arguments, int most_shared, Launch run) {
  if (arguments.problem.rectify) return launch_rectified<S, R, true>(arguments, most_shared, run);
  launch_rectified<S, R, false>(arguments, most_shared, run);
}

// Calls run(kernel, shape, arguments) with the instance for the problem; Arguments are forward's or backward's, and
// most_shared as choose_shape takes it.
template <typename S, typename Arguments, typename Launch>
void launch(const Arguments& arguments, int most_shared, Launch run) {
  switch (arguments.problem.order) {
    case 1: return launch_order<S, 1>(arguments, most_shared, run);
    case 2: return launch_order<S, 2>(arguments, most_shared, run);
    case 3: return launch_order<S, 3>(arguments, most_shared, run);
    default: return launch_order<S, 4>(arguments, most_shared, run);
  }
}

inline int64_t blocks_for(const Shape& shape, int64_t rows) {
  const int rows_per_block = shape.threads / shape.threads_per_row;
  return (rows + rows_per_block - 1) / rows_per_block;
}

using SumKernel = void (*)(const float*, int64_t, const int32_t*, int, float*);

inline SumKernel sum_kernel(int order) {
  switch (order) {
    case 1: return sum_terms_kernel<2>;
    case 2: return sum_terms_kernel<3>;
    case 3: return sum_terms_kernel<4>;
    default: return sum_terms_kernel<5>;
  }
}

// The coefficient gradients from the items that the backward kernel left; run(kernel, blocks, arguments of the kernel).
template <typename AllocateFloats, typename Run>
void launch_sums(const float* terms, int64_t items, const Parameters& parameters, int order, float* coefficients,
                 AllocateFloats allocate, Run run) {
  const int slices = slices_for(items), experts = parameters.experts;
  const SumKernel kernel = sum_kernel(order);
  float* const first = slices > 1 ? allocate(int64_t(experts) * slices * (order + 1)) : coefficients;
  run(kernel, experts * slices, terms, items, parameters.ends, slices, first);
  if (slices > 1) run(kernel, experts, first, slices, nullptr, 1, coefficients);
}

}  // namespace
}  // namespace polycom
