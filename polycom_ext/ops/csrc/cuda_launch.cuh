// Which instance of a kernel serves a problem; the launching itself is the caller's (a stream, or the emulator).
#pragma once

#include "cuda_kernels.cuh"

namespace polycom {
namespace {

constexpr int NARROW_THREADS = 128;  // four rows a block, a warp each
constexpr int LOOPED_THREADS = 512;

struct Shape {
  int vectors_per_thread;
  int threads_per_row;
  int threads;
  int vectors;  // whole vectors of a row that are read as such
};

// How a block holds a wide row: vectors in a thread's registers, at most so many threads.
struct Hold {
  int vectors;
  int threads;
};

// A row of 32 KiB leaves room for a second block on the processor, whose loads then run while this one computes.
constexpr Hold FORWARD_WIDE = {4, 256}, FORWARD_WIDEST = {8, 512};
// Two rows, of x and of y's gradient. The widest take half of all registers: few threads with many registers each do
// not spill, where more threads with fewer do.
constexpr Hold BACKWARD_WIDE = {4, 512}, BACKWARD_WIDEST = {16, 256};

inline int round_up(int64_t value, int multiple) { return int((value + multiple - 1) / multiple * multiple); }

// A warp holds a narrow row, a block a wide one of up to 64 KiB; any other width or alignment takes the looped path.
inline Shape choose_shape(int64_t width, int per_vector, bool aligned, Hold wide, Hold widest) {
  const bool whole = aligned && width % per_vector == 0;
  const int vectors = whole ? int(width / per_vector) : 0;
  if (whole) {
    for (int each : {4, 8}) {
      if (vectors <= each * WARP) return {each, WARP, NARROW_THREADS, vectors};
    }
    for (Hold hold : {wide, widest}) {
      if (vectors > hold.vectors * hold.threads) continue;
      const int threads = round_up((vectors + hold.vectors - 1) / hold.vectors, WARP);
      return {hold.vectors, threads, threads, vectors};
    }
  }
  const int threads = width < LOOPED_THREADS ? round_up(width, WARP) : LOOPED_THREADS;
  return {0, threads, threads, vectors};
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename S, int R, bool RECTIFY, typename Launch>
void launch_forward(const ForwardArguments& arguments, Launch launch) {
  constexpr Hold wide = FORWARD_WIDE, widest = FORWARD_WIDEST;
  const bool aligned = is_aligned(arguments.x) && is_aligned(arguments.y);
  const Shape shape = choose_shape(arguments.problem.width, PER_VECTOR<S>, aligned, wide, widest);
  const bool narrow = shape.threads_per_row < shape.threads;
  switch (shape.vectors_per_thread) {
    case 0: return launch(forward_kernel<S, R, RECTIFY, 0, LOOPED_THREADS>, shape, arguments);
    case 4:
      if (narrow) return launch(forward_kernel<S, R, RECTIFY, 4, NARROW_THREADS>, shape, arguments);
      return launch(forward_kernel<S, R, RECTIFY, wide.vectors, wide.threads>, shape, arguments);
    default:
      if (narrow) return launch(forward_kernel<S, R, RECTIFY, 8, NARROW_THREADS>, shape, arguments);
      return launch(forward_kernel<S, R, RECTIFY, widest.vectors, widest.threads>, shape, arguments);
  }
}

template <typename S, int R, bool RECTIFY, typename Launch>
void launch_backward(const BackwardArguments& arguments, Launch launch) {
  constexpr Hold wide = BACKWARD_WIDE, widest = BACKWARD_WIDEST;
  const bool aligned = is_aligned(arguments.x) && is_aligned(arguments.grad_y) && is_aligned(arguments.grad_x) &&
                       is_aligned(arguments.y);
  const Shape shape = choose_shape(arguments.problem.width, PER_VECTOR<S>, aligned, wide, widest);
  const bool narrow = shape.threads_per_row < shape.threads;
  switch (shape.vectors_per_thread) {
    case 0: return launch(backward_kernel<S, R, RECTIFY, 0, LOOPED_THREADS>, shape, arguments);
    case 4:
      if (narrow) return launch(backward_kernel<S, R, RECTIFY, 4, NARROW_THREADS>, shape, arguments);
      return launch(backward_kernel<S, R, RECTIFY, wide.vectors, wide.threads>, shape, arguments);
    case 8: return launch(backward_kernel<S, R, RECTIFY, 8, NARROW_THREADS>, shape, arguments);
    default: return launch(backward_kernel<S, R, RECTIFY, widest.vectors, widest.threads>, shape, arguments);
  }
}

template <typename S, int R, typename Launch>
void launch_order(const ForwardArguments& arguments, Launch run) {
  if (arguments.problem.rectify) return launch_forward<S, R, true>(arguments, run);
  return launch_forward<S, R, false>(arguments, run);
}

template <typename S, int R, typename Launch>
void launch_order(const BackwardArguments& arguments, Launch run) {
  if (arguments.problem.rectify) return launch_backward<S, R, true>(arguments, run);
  return launch_backward<S, R, false>(arguments, run);
}

// Calls run(kernel, shape, arguments) with the instance for the problem; Arguments are forward's or backward's.
template <typename S, typename Arguments, typename Launch>
void launch(const Arguments& arguments, Launch run) {
  switch (arguments.problem.order) {
    case 1: return launch_order<S, 1>(arguments, run);
    case 2: return launch_order<S, 2>(arguments, run);
    case 3: return launch_order<S, 3>(arguments, run);
    default: return launch_order<S, 4>(arguments, run);
  }
}

inline int64_t blocks_for(const Shape& shape, int64_t rows) {
  const int rows_per_block = shape.threads / shape.threads_per_row;
  return (rows + rows_per_block - 1) / rows_per_block;
}

}  // namespace
}  // namespace polycom
