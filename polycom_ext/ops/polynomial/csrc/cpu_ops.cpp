// The library `polycom`: the operations' schemas, and their CPU implementations through torch's stable ABI.
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu_kernels.h"
#include "cpu_quantized.h"
#include "operators.h"
#include "polynomial.h"
#include "quantized_operator.h"

namespace polycom {
namespace {

struct Kernels {
  const char* name;
  ForwardKernel forward;
  BackwardKernel backward;
};

// The best that this processor can run; as for torch's own kernels, ATEN_CPU_CAPABILITY may lower the choice.
const Kernels& kernels() {
  static const Kernels chosen = [] {
#if defined(__x86_64__)
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string limit = variable ? variable : "avx512";
    if (limit != "default" && limit != "avx2" && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      return Kernels{"avx512", avx512::forward, avx512::backward};
    }
    if (limit != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      return Kernels{"avx2", avx2::forward, avx2::backward};
    }
#endif
    return Kernels{"baseline", baseline::forward, baseline::backward};
  }();
  return chosen;
}

// Rows that are worth a thread's start.
int64_t grain(const Problem& problem) {
  constexpr int64_t elements = 32768;
  return elements / problem.width + 1;
}

// coefficients[expert] = sum over its rows of row_scale * dots, powers descending and then the constant.
void sum_coefficients(const BackwardArguments& arguments, float* coefficients) {
  const Parameters& parameters = arguments.parameters;
  const int order = arguments.problem.order;
  std::vector<double> sums(size_t(parameters.experts) * (order + 1));
  for (int64_t row = 0; row < arguments.problem.rows; ++row) {
    const int expert = parameters.ends ? expert_of_row(parameters.ends, parameters.experts, row) : 0;
    if (expert == parameters.experts) continue;
    const float scale = parameters.row_scale ? parameters.row_scale[row] : 1.0f;
    for (int i = 0; i <= order; ++i) {
      sums[size_t(expert) * (order + 1) + order - i] += double(scale) * double(arguments.dots[row * (order + 1) + i]);
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) coefficients[i] = float(sums[i]);
}

struct Cpu {
  static void run(const ForwardArguments& arguments, const Tensor&) {
    torch::stable::parallel_for(0, arguments.problem.rows, grain(arguments.problem), [&](int64_t begin, int64_t end) {
      kernels().forward(arguments, begin, end);
    });
  }

  static void run(QuantizedArguments arguments, const Tensor& x) {
    const Problem& problem = arguments.forward.problem;
    const Quantization& to = arguments.quantization;
    std::vector<uint16_t> y(size_t(problem.rows * problem.width));
    arguments.forward.y = y.data();
    run(arguments.forward, x);
    torch::stable::parallel_for(0, problem.rows, grain(problem), [&](int64_t begin, int64_t end) {
      quantize_rows(to, y.data(), problem.width, begin, end);
    });
    if (to.recipe != Recipe::TENSOR || problem.rows == 0) return;
    *to.largest = fmaxf(*to.largest, largest_of(y.data(), int64_t(y.size())));
    *reinterpret_cast<float*>(to.inverses) = 1.0f / *to.scale;
  }

  static void run(BackwardArguments arguments, const Tensor&, float* coefficients) {
    std::vector<float> dots;
    if (arguments.problem.step == Step::WHOLE) {
      dots.resize(size_t(arguments.problem.rows) * (arguments.problem.order + 1));
      arguments.dots = dots.data();
    }
    torch::stable::parallel_for(0, arguments.problem.rows, grain(arguments.problem), [&](int64_t begin, int64_t end) {
      kernels().backward(arguments, begin, end);
    });
    if (coefficients) sum_coefficients(arguments, coefficients);
  }
};

// The digest of the sources that this library was built from, and the instruction set chosen.
std::string build() { return std::string(POLYCOM_SOURCES) + " " + kernels().name; }

}  // namespace
}  // namespace polycom

STABLE_TORCH_LIBRARY(polycom, library) {
  library.def("polynomial_build() -> str");
  library.def("polynomial(" POLYCOM_FLAT ") -> (Tensor y, Tensor scales)");
  library.def(
      "polynomial_backward(" POLYCOM_FLAT ", Tensor grad_y, Tensor scales, bool recompute) "
      "-> (Tensor grad_x, Tensor grad_coefficients, Tensor grad_row_scale, Tensor y)");
  library.def("polynomial_quantized(" POLYCOM_FLAT ", " POLYCOM_TARGET ") -> Tensor scales");
  library.def("polynomial_sums(" POLYCOM_FLAT ") -> Tensor");
  library.def("polynomial_from_sums(" POLYCOM_FLAT ", Tensor sums, int total_width) -> (Tensor y, Tensor scales)");
  library.def("polynomial_backward_sums(" POLYCOM_FLAT ", Tensor grad_y, Tensor scales) -> Tensor");
  library.def(
      "polynomial_backward_from_sums(" POLYCOM_FLAT ", Tensor grad_y, Tensor scales, Tensor dots, int total_width) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(polycom, CompositeExplicitAutograd, library) {
  library.impl("polynomial_build", TORCH_BOX(&polycom::build));
}

STABLE_TORCH_LIBRARY_IMPL(polycom, CPU, library) {
  polycom::register_operators<polycom::Cpu>(library);
  library.impl("polynomial_quantized", TORCH_BOX(&polycom::Flat<&polycom::quantized<polycom::Cpu>>::call));
}
