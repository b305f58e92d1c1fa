// The CUDA kernels, and the choice of their instances, run on the CPU by the block emulator; called by ctypes.
#include "cuda_launch.cuh"
#include "cuda_quantized.cuh"

using namespace polycom;

namespace {

char chosen[64];
int most_shared;

void choose(const Hold (&holds)[HOLDS], const Shape& shape) {
  snprintf(chosen, sizeof chosen, "%d vectors, %d of %d threads", holds[shape.hold].vectors, shape.threads_per_row,
           shape.threads);
}

template <typename S>
void forward(const ForwardArguments& arguments, int64_t max_blocks) {
  launch<S>(arguments, most_shared, [&](auto kernel, const Shape& shape, const ForwardArguments& with) {
    const int64_t blocks = blocks_for(shape, with.problem.rows);
    choose(FORWARD_HOLDS, shape);
    emulator::launch(unsigned(blocks < max_blocks ? blocks : max_blocks), unsigned(shape.threads),
                     [&] { kernel(with, shape.vectors); }, unsigned(shape.shared));
  });
}

template <typename S>
void backward(BackwardArguments arguments, float* coefficients, int64_t max_blocks) {
  const Problem& problem = arguments.problem;
  const Parameters& parameters = arguments.parameters;
  std::vector<float> terms;
  launch<S>(arguments, most_shared, [&](auto kernel, const Shape& shape, BackwardArguments with) {
    int64_t blocks = blocks_for(shape, problem.rows);
    blocks = blocks < max_blocks ? blocks : max_blocks;
    choose(BACKWARD_HOLDS, shape);
    if (problem.step == Step::WHOLE) {
      const int64_t items = parameters.ends ? problem.rows : blocks * (shape.threads / shape.threads_per_row);
      terms.assign(size_t(items) * (problem.order + 1), NAN);
      with.terms = terms.data();
    }
    emulator::launch(unsigned(blocks), unsigned(shape.threads),
                     [&] { kernel(with, shape.vectors); }, unsigned(shape.shared));
  });
  if (problem.step != Step::WHOLE) return;
  const int columns = problem.order + 1;
  const int64_t items = int64_t(terms.size()) / columns;
  std::vector<float> slices;
  launch_sums(
      terms.data(), items, parameters, problem.order, coefficients,
      [&](int64_t floats) {
        slices.assign(size_t(floats), NAN);
        return slices.data();
      },
      [&](auto kernel, int blocks, auto... with) {
        emulator::launch(unsigned(blocks), SUM_THREADS, [&] { kernel(with...); });
      });
}

}  // namespace

extern "C" {

const char* chosen_shape() { return chosen; }

// Bytes that a block of the emulated device may have.
void set_most_shared(int bytes) { most_shared = bytes; }

void run_forward(const ForwardArguments* arguments, int64_t max_blocks) {
  switch (arguments->problem.storage) {
    case Storage::FLOAT: return forward<FloatStorage>(*arguments, max_blocks);
    case Storage::BFLOAT16: return forward<BFloat16Storage>(*arguments, max_blocks);
    case Storage::HALF: return forward<HalfStorage>(*arguments, max_blocks);
  }
}

void run_quantized(const QuantizedArguments* arguments, int64_t max_blocks) {
  launch_quantized(*arguments, [&](auto kernel, const Shape& shape, const QuantizedArguments& with) {
    const int64_t blocks = blocks_for(shape, with.forward.problem.rows);
    choose(FORWARD_HOLDS, shape);
    emulator::launch(unsigned(blocks < max_blocks ? blocks : max_blocks), unsigned(shape.threads),
                     [&] { kernel(with, shape.vectors); });
  });
}

void run_backward(const BackwardArguments* arguments, float* coefficients, int64_t max_blocks) {
  switch (arguments->problem.storage) {
    case Storage::FLOAT: return backward<FloatStorage>(*arguments, coefficients, max_blocks);
    case Storage::BFLOAT16: return backward<BFloat16Storage>(*arguments, coefficients, max_blocks);
    case Storage::HALF: return backward<HalfStorage>(*arguments, coefficients, max_blocks);
  }
}
}
