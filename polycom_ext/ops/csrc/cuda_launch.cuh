// Which instance of a kernel serves a problem; the launching itself is the caller's (a stream, or the emulator).
#pragma once

#include "cuda_kernels.cuh"

namespace polycom {
namespace {

constexpr int NARROW_THREADS = 128;  // four rows a block, a warp each
constexpr int WIDE_THREADS = 512;    // at most, for one row: 128 registers a thread

struct Shape {
  int vectors_per_thread;
  int threads_per_row;
  int threads;
  int vectors;  // whole vectors of a row that are read as such
};

inline int round_up(int64_t value, int multiple) { return int((value + multiple - 1) / multiple * multiple); }

// At most `most` vectors a thread where a block owns a row: 8 hold a row of 64 KiB, forward; backward, which holds two
// tensors' rows, 8 spill a few bytes on sm_80, so that it keeps 32 KiB. Anything else takes the looped path.
inline Shape choose_shape(int64_t width, int per_vector, bool aligned, int most) {
  const bool whole = aligned && width % per_vector == 0;
  const int vectors = whole ? int(width / per_vector) : 0;
  if (whole) {
    if (vectors <= 4 * WARP) return {4, WARP, NARROW_THREADS, vectors};
    if (vectors <= 8 * WARP) return {8, WARP, NARROW_THREADS, vectors};
    for (int each = 4; each <= most; each *= 2) {
      if (vectors > each * WIDE_THREADS) continue;
      const int threads = round_up((vectors + each - 1) / each, WARP);
      return {each, threads, threads, vectors};
    }
  }
  const int threads = width < WIDE_THREADS ? round_up(width, WARP) : WIDE_THREADS;
  return {0, threads, threads, vectors};
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename S, int R, typename Launch>
void launch_forward(const ForwardArguments& arguments, Launch launch) {
  const bool aligned = is_aligned(arguments.x) && is_aligned(arguments.y);
  const Shape shape = choose_shape(arguments.problem.width, PER_VECTOR<S>, aligned, 8);
  const bool narrow = shape.threads_per_row < shape.threads;
  switch (shape.vectors_per_thread) {
    case 0: return launch(forward_kernel<S, R, 0, WIDE_THREADS>, shape, arguments);
    case 4:
      if (narrow) return launch(forward_kernel<S, R, 4, NARROW_THREADS>, shape, arguments);
      return launch(forward_kernel<S, R, 4, WIDE_THREADS>, shape, arguments);
    default:
      if (narrow) return launch(forward_kernel<S, R, 8, NARROW_THREADS>, shape, arguments);
      return launch(forward_kernel<S, R, 8, WIDE_THREADS>, shape, arguments);
  }
}

template <typename S, int R, typename Launch>
void launch_backward(const BackwardArguments& arguments, Launch launch) {
  const bool aligned = is_aligned(arguments.x) && is_aligned(arguments.grad_y) && is_aligned(arguments.grad_x) &&
                       is_aligned(arguments.y);
  const Shape shape = choose_shape(arguments.problem.width, PER_VECTOR<S>, aligned, 4);
  const bool narrow = shape.threads_per_row < shape.threads;
  switch (shape.vectors_per_thread) {
    case 0: return launch(backward_kernel<S, R, 0, WIDE_THREADS>, shape, arguments);
    case 4:
      if (narrow) return launch(backward_kernel<S, R, 4, NARROW_THREADS>, shape, arguments);
      return launch(backward_kernel<S, R, 4, WIDE_THREADS>, shape, arguments);
    default: return launch(backward_kernel<S, R, 8, NARROW_THREADS>, shape, arguments);
  }
}

template <typename S, typename Launch>
void launch(const ForwardArguments& arguments, Launch run) {
  switch (arguments.problem.order) {
    case 1: return launch_forward<S, 1>(arguments, run);
    case 2: return launch_forward<S, 2>(arguments, run);
    case 3: return launch_forward<S, 3>(arguments, run);
    default: return launch_forward<S, 4>(arguments, run);
  }
}

template <typename S, typename Launch>
void launch(const BackwardArguments& arguments, Launch run) {
  switch (arguments.problem.order) {
    case 1: return launch_backward<S, 1>(arguments, run);
    case 2: return launch_backward<S, 2>(arguments, run);
    case 3: return launch_backward<S, 3>(arguments, run);
    default: return launch_backward<S, 4>(arguments, run);
  }
}

inline int64_t blocks_for(const Shape& shape, int64_t rows) {
  const int rows_per_block = shape.threads / shape.threads_per_row;
  return (rows + rows_per_block - 1) / rows_per_block;
}

}  // namespace
}  // namespace polycom
