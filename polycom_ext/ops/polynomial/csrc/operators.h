// The operations, and the checks and allocations that CPU and CUDA have in common.
//
// Contracts that the Python side keeps (fused.py): tensors are contiguous, x is (rows, width), parameters are
// float32, offsets int32. What is checked here keeps a direct call from reading beyond a tensor.
#pragma once

#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "arguments.h"

namespace polycom {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int MAX_FUSED_ORDER = 4;

// What is applied to x; the same numbers as inputs.Rho.
constexpr int64_t IDENTITY = 0;
constexpr int64_t RELU = 1;

inline Storage storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Storage::FLOAT;
    case ScalarType::BFloat16: return Storage::BFLOAT16;
    case ScalarType::Half: return Storage::HALF;
    default: STD_TORCH_CHECK(false, "polycom: x must be float32, bfloat16 or float16");
  }
}

inline void check_tensor(const Tensor& tensor, const char* name, ScalarType type, const Tensor& x) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, "polycom: ", name, " has the wrong type");
  STD_TORCH_CHECK(tensor.is_contiguous(), "polycom: ", name, " must be contiguous");
  STD_TORCH_CHECK(tensor.is_cuda() == x.is_cuda() && tensor.get_device_index() == x.get_device_index(),
                  "polycom: ", name, " must be on the device of x");
}

inline void check_size(const Tensor& tensor, const char* name, int64_t size) {
  STD_TORCH_CHECK(tensor.numel() == size, "polycom: ", name, " must have ", size, " elements, got ", tensor.numel());
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& x) {
  check_tensor(tensor, name, x.scalar_type(), x);
  check_size(tensor, name, x.numel());
}

// What every operation is given, as inputs.Inputs; FLAT is the same in a schema, and Flat in a signature.
struct Inputs {
  Tensor x, weight, bias;
  OptionalTensor pre_bias, row_scale, offsets;
  int64_t rho;
  bool normalize;
  double eps;

  int64_t rows() const { return x.size(0); }
  int64_t experts() const { return bias.numel(); }
  int64_t order() const {
    STD_TORCH_CHECK(experts() > 0 && weight.numel() % experts() == 0, "polycom: weight and bias do not match");
    return weight.numel() / experts();
  }
};

#define POLYCOM_FLAT                                                                                             \
  "Tensor x, Tensor weight, Tensor bias, Tensor? pre_bias, Tensor? row_scale, Tensor? offsets, int rho, "       \
  "bool normalize, float eps"

template <auto OPERATION>
struct Flat;

template <typename Result, typename... More, Result (*OPERATION)(const Inputs&, More...)>
struct Flat<OPERATION> {
  static Result call(Tensor x, Tensor weight, Tensor bias, OptionalTensor pre_bias, OptionalTensor row_scale,
                     OptionalTensor offsets, int64_t rho, bool normalize, double eps, More... more) {
    return OPERATION({x, weight, bias, pre_bias, row_scale, offsets, rho, normalize, eps}, more...);
  }
};

inline Problem make_problem(const Inputs& inputs, Step step, int64_t total_width = 0) {
  const Tensor& x = inputs.x;
  const int64_t order = inputs.order();
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, "polycom: x must have shape (rows, width)");
  STD_TORCH_CHECK(x.size(1) <= INT32_MAX, "polycom: rows are too wide");
  STD_TORCH_CHECK(x.is_contiguous(), "polycom: x must be contiguous");
  STD_TORCH_CHECK(order >= 1 && order <= MAX_FUSED_ORDER, "polycom: the order must be 1 to 4, got ", order);
  STD_TORCH_CHECK(inputs.rho == RELU || (inputs.rho == IDENTITY && inputs.normalize), "polycom: this rho is not fused");
  STD_TORCH_CHECK(inputs.normalize || step == Step::WHOLE, "polycom: only normalised rows have sums");
  return {storage_of(x), int(order), inputs.rho == RELU, inputs.normalize, step, float(inputs.eps), x.size(0),
          x.size(1), float(1.0 / double(total_width ? total_width : x.size(1)))};
}

inline Parameters make_parameters(const Inputs& inputs) {
  const auto& [x, weight, bias, pre_bias, row_scale, offsets, rho, normalize, eps] = inputs;
  check_tensor(weight, "weight", ScalarType::Float, x);
  check_tensor(bias, "bias", ScalarType::Float, x);
  Parameters parameters = {};
  parameters.weight = weight.const_data_ptr<float>();
  parameters.bias = bias.const_data_ptr<float>();
  parameters.experts = int(bias.numel());
  STD_TORCH_CHECK(offsets.has_value() || parameters.experts == 1, "polycom: several sets of coefficients need offsets");
  if (offsets) {
    check_tensor(*offsets, "offsets", ScalarType::Int, x);
    check_size(*offsets, "offsets", parameters.experts);
    parameters.ends = offsets->const_data_ptr<int32_t>();
  }
  if (pre_bias) {
    check_tensor(*pre_bias, "pre_bias", ScalarType::Float, x);
    parameters.pre_bias_per_expert = pre_bias->dim() == 2;
    check_size(*pre_bias, "pre_bias", x.size(1) * (parameters.pre_bias_per_expert ? parameters.experts : 1));
    parameters.pre_bias = pre_bias->const_data_ptr<float>();
  }
  if (row_scale) {
    check_tensor(*row_scale, "row_scale", ScalarType::Float, x);
    check_size(*row_scale, "row_scale", x.size(0));
    parameters.row_scale = row_scale->const_data_ptr<float>();
  }
  return parameters;
}

inline Tensor empty(const Tensor& x, std::initializer_list<int64_t> shape, ScalarType type) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::new_empty(x, {sizes.data(), sizes.size()}, type);
}

template <typename T>
T* data_or_null(const Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

// A device runs the kernels on arguments, and sums the coefficient gradients in a fixed order.
template <typename Device>
struct Operators {
  static ForwardArguments forward_arguments(const Inputs& inputs, Step step, int64_t total_width = 0) {
    ForwardArguments arguments = {};
    arguments.problem = make_problem(inputs, step, total_width);
    arguments.parameters = make_parameters(inputs);
    arguments.x = inputs.x.const_data_ptr();
    return arguments;
  }

  static std::tuple<Tensor, Tensor> run_forward(ForwardArguments arguments, const Inputs& inputs) {
    Tensor y = torch::stable::empty_like(inputs.x);
    Tensor scales = empty(inputs.x, {inputs.normalize ? inputs.rows() : 0, inputs.order()}, ScalarType::Float);
    arguments.y = y.mutable_data_ptr();
    arguments.scales = data_or_null<float>(scales);
    Device::run(arguments, inputs.x);
    return {y, scales};
  }

  static std::tuple<Tensor, Tensor> forward(const Inputs& inputs) {
    return run_forward(forward_arguments(inputs, Step::WHOLE), inputs);
  }

  static Tensor sums(const Inputs& inputs) {
    ForwardArguments arguments = forward_arguments(inputs, Step::REDUCE);
    Tensor sums = empty(inputs.x, {inputs.rows(), inputs.order()}, ScalarType::Double);
    arguments.power_sums = data_or_null<double>(sums);
    Device::run(arguments, inputs.x);
    return sums;
  }

  static std::tuple<Tensor, Tensor> from_sums(const Inputs& inputs, Tensor sums, int64_t total_width) {
    ForwardArguments arguments = forward_arguments(inputs, Step::APPLY, total_width);
    check_tensor(sums, "sums", ScalarType::Double, inputs.x);
    check_size(sums, "sums", inputs.rows() * inputs.order());
    arguments.power_sums = data_or_null<double>(sums);
    return run_forward(arguments, inputs);
  }

  static BackwardArguments backward_arguments(const Inputs& inputs, const Tensor& grad_y, const Tensor& scales, Step step,
                                              int64_t total_width = 0) {
    BackwardArguments arguments = {};
    arguments.problem = make_problem(inputs, step, total_width);
    arguments.parameters = make_parameters(inputs);
    check_like(grad_y, "grad_y", inputs.x);
    check_tensor(scales, "scales", ScalarType::Float, inputs.x);
    check_size(scales, "scales", inputs.normalize ? inputs.rows() * inputs.order() : 0);
    arguments.x = inputs.x.const_data_ptr();
    arguments.grad_y = grad_y.const_data_ptr();
    arguments.scales = data_or_null<float>(scales);
    return arguments;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Inputs& inputs, Tensor grad_y, Tensor scales,
                                                             bool recompute) {
    const Tensor& x = inputs.x;
    BackwardArguments arguments = backward_arguments(inputs, grad_y, scales, Step::WHOLE);
    Tensor grad_x = torch::stable::empty_like(x);
    Tensor y = empty(x, {recompute ? x.size(0) : 0, x.size(1)}, x.scalar_type());
    Tensor grad_row_scale = empty(x, {inputs.row_scale ? x.size(0) : 0}, ScalarType::Float);
    Tensor coefficients = empty(x, {inputs.experts(), inputs.order() + 1}, ScalarType::Float);
    arguments.grad_x = grad_x.mutable_data_ptr();
    arguments.y = data_or_null<void>(y);
    arguments.grad_row_scale = data_or_null<float>(grad_row_scale);
    Device::run(arguments, x, coefficients.template mutable_data_ptr<float>());
    return {grad_x, coefficients, grad_row_scale, y};
  }

  static Tensor backward_sums(const Inputs& inputs, Tensor grad_y, Tensor scales) {
    BackwardArguments arguments = backward_arguments(inputs, grad_y, scales, Step::REDUCE);
    Tensor dots = empty(inputs.x, {inputs.rows(), inputs.order() + 1}, ScalarType::Float);
    arguments.dots = data_or_null<float>(dots);
    Device::run(arguments, inputs.x, nullptr);
    return dots;
  }

  static Tensor backward_from_sums(const Inputs& inputs, Tensor grad_y, Tensor scales, Tensor dots,
                                   int64_t total_width) {
    BackwardArguments arguments = backward_arguments(inputs, grad_y, scales, Step::APPLY, total_width);
    check_tensor(dots, "dots", ScalarType::Float, inputs.x);
    check_size(dots, "dots", inputs.rows() * (inputs.order() + 1));
    Tensor grad_x = torch::stable::empty_like(inputs.x);
    arguments.grad_x = grad_x.mutable_data_ptr();
    arguments.dots = data_or_null<float>(dots);
    Device::run(arguments, inputs.x, nullptr);
    return grad_x;
  }
};

template <typename Device>
void register_operators(torch::stable::detail::StableLibrary& library) {
  using Of = Operators<Device>;
  library.impl("polynomial", TORCH_BOX(&Flat<&Of::forward>::call));
  library.impl("polynomial_backward", TORCH_BOX(&Flat<&Of::backward>::call));
  library.impl("polynomial_sums", TORCH_BOX(&Flat<&Of::sums>::call));
  library.impl("polynomial_from_sums", TORCH_BOX(&Flat<&Of::from_sums>::call));
  library.impl("polynomial_backward_sums", TORCH_BOX(&Flat<&Of::backward_sums>::call));
  library.impl("polynomial_backward_from_sums", TORCH_BOX(&Flat<&Of::backward_from_sums>::call));
}

}  // namespace polycom
