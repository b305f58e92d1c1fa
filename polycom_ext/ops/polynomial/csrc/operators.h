// The operations' signatures, and the checks and allocations that CPU and CUDA have in common.
//
// Contracts that the Python side keeps (dispatch.py): tensors are contiguous, x is (rows, width), parameters are
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

// What is applied to x; the same numbers as eager.Rho.
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

inline Problem make_problem(const Tensor& x, int64_t order, int64_t rho, bool normalize, Step step, double eps,
                            int64_t total_width = 0) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, "polycom: x must have shape (rows, width)");
  STD_TORCH_CHECK(x.size(1) <= INT32_MAX, "polycom: rows are too wide");
  STD_TORCH_CHECK(x.is_contiguous(), "polycom: x must be contiguous");
  STD_TORCH_CHECK(order >= 1 && order <= MAX_FUSED_ORDER, "polycom: the order must be 1 to 4, got ", order);
  STD_TORCH_CHECK(rho == RELU || (rho == IDENTITY && normalize), "polycom: this rho is not fused");
  return {storage_of(x), int(order), rho == RELU, normalize, step, float(eps), x.size(0), x.size(1),
          float(1.0 / double(total_width ? total_width : x.size(1)))};
}

inline Parameters make_parameters(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                  const OptionalTensor& pre_bias, const OptionalTensor& row_scale,
                                  const OptionalTensor& offsets) {
  check_tensor(weight, "weight", ScalarType::Float, x);
  check_tensor(bias, "bias", ScalarType::Float, x);
  Parameters parameters = {};
  parameters.weight = weight.const_data_ptr<float>();
  parameters.bias = bias.const_data_ptr<float>();
  parameters.experts = int(bias.numel());
  STD_TORCH_CHECK(parameters.experts >= 1, "polycom: bias must not be empty");
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

inline int64_t order_of(const Tensor& weight, const Tensor& bias) {
  const int64_t experts = bias.numel();
  STD_TORCH_CHECK(experts > 0 && weight.numel() % experts == 0, "polycom: weight and bias do not match");
  return weight.numel() / experts;
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
  static std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, Tensor bias, OptionalTensor pre_bias,
                                            OptionalTensor row_scale, OptionalTensor offsets, int64_t rho,
                                            bool normalize, double eps) {
    const int64_t order = order_of(weight, bias);
    ForwardArguments arguments = {};
    arguments.problem = make_problem(x, order, rho, normalize, Step::WHOLE, eps);
    arguments.parameters = make_parameters(x, weight, bias, pre_bias, row_scale, offsets);
    Tensor y = torch::stable::empty_like(x);
    Tensor scales = empty(x, {normalize ? x.size(0) : 0, order}, ScalarType::Float);
    arguments.x = x.const_data_ptr();
    arguments.y = y.mutable_data_ptr();
    arguments.scales = data_or_null<float>(scales);
    Device::run(arguments, x);
    return {y, scales};
  }

  static Tensor power_sums(Tensor x, OptionalTensor pre_bias, OptionalTensor offsets, int64_t rho, int64_t order) {
    ForwardArguments arguments = {};
    arguments.problem = make_problem(x, order, rho, true, Step::REDUCE, 0.0);
    const int64_t experts = offsets ? offsets->numel() : 1;
    Tensor unused_weight = empty(x, {experts * order}, ScalarType::Float);
    Tensor unused_bias = empty(x, {experts}, ScalarType::Float);
    arguments.parameters = make_parameters(x, unused_weight, unused_bias, pre_bias, std::nullopt, offsets);
    Tensor sums = empty(x, {x.size(0), order}, ScalarType::Double);
    arguments.x = x.const_data_ptr();
    arguments.power_sums = data_or_null<double>(sums);
    Device::run(arguments, x);
    return sums;
  }

  static std::tuple<Tensor, Tensor> apply(Tensor x, Tensor weight, Tensor bias, Tensor sums, OptionalTensor pre_bias,
                                          OptionalTensor row_scale, OptionalTensor offsets, int64_t rho, double eps,
                                          int64_t total_width) {
    const int64_t order = order_of(weight, bias);
    ForwardArguments arguments = {};
    arguments.problem = make_problem(x, order, rho, true, Step::APPLY, eps, total_width);
    arguments.parameters = make_parameters(x, weight, bias, pre_bias, row_scale, offsets);
    check_tensor(sums, "power_sums", ScalarType::Double, x);
    check_size(sums, "power_sums", x.size(0) * order);
    Tensor y = torch::stable::empty_like(x);
    Tensor scales = empty(x, {x.size(0), order}, ScalarType::Float);
    arguments.x = x.const_data_ptr();
    arguments.y = y.mutable_data_ptr();
    arguments.power_sums = data_or_null<double>(sums);
    arguments.scales = data_or_null<float>(scales);
    Device::run(arguments, x);
    return {y, scales};
  }

  static BackwardArguments backward_arguments(const Tensor& grad_y, const Tensor& x, const Tensor& scales, int64_t order,
                                              int64_t rho, bool normalize, Step step, int64_t total_width = 0) {
    BackwardArguments arguments = {};
    arguments.problem = make_problem(x, order, rho, normalize, step, 0.0, total_width);
    check_like(grad_y, "grad_y", x);
    check_tensor(scales, "scales", ScalarType::Float, x);
    check_size(scales, "scales", normalize ? x.size(0) * order : 0);
    arguments.x = x.const_data_ptr();
    arguments.grad_y = grad_y.const_data_ptr();
    arguments.scales = data_or_null<float>(scales);
    return arguments;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_y, Tensor x, Tensor weight, Tensor bias,
                                                             Tensor scales, OptionalTensor pre_bias,
                                                             OptionalTensor row_scale, OptionalTensor offsets,
                                                             int64_t rho, bool normalize, bool recompute) {
    const int64_t order = order_of(weight, bias);
    BackwardArguments arguments = backward_arguments(grad_y, x, scales, order, rho, normalize, Step::WHOLE);
    arguments.parameters = make_parameters(x, weight, bias, pre_bias, row_scale, offsets);
    Tensor grad_x = torch::stable::empty_like(x);
    Tensor y = empty(x, {recompute ? x.size(0) : 0, x.size(1)}, x.scalar_type());
    Tensor grad_row_scale = empty(x, {row_scale ? x.size(0) : 0}, ScalarType::Float);
    Tensor coefficients = empty(x, {bias.numel(), order + 1}, ScalarType::Float);
    arguments.grad_x = grad_x.mutable_data_ptr();
    arguments.y = data_or_null<void>(y);
    arguments.grad_row_scale = data_or_null<float>(grad_row_scale);
    Device::run(arguments, x, coefficients.template mutable_data_ptr<float>());
    return {grad_x, coefficients, grad_row_scale, y};
  }

  static Tensor row_dots(Tensor grad_y, Tensor x, Tensor scales, OptionalTensor pre_bias, OptionalTensor offsets,
                         int64_t rho) {
    const int64_t order = scales.size(-1);
    BackwardArguments arguments = backward_arguments(grad_y, x, scales, order, rho, true, Step::REDUCE);
    const int64_t experts = offsets ? offsets->numel() : 1;
    Tensor unused_weight = empty(x, {experts * order}, ScalarType::Float);
    Tensor unused_bias = empty(x, {experts}, ScalarType::Float);
    arguments.parameters = make_parameters(x, unused_weight, unused_bias, pre_bias, std::nullopt, offsets);
    Tensor dots = empty(x, {x.size(0), order + 1}, ScalarType::Float);
    arguments.dots = data_or_null<float>(dots);
    Device::run(arguments, x, nullptr);
    return dots;
  }

  static Tensor apply_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor scales, Tensor dots,
                               OptionalTensor pre_bias, OptionalTensor row_scale, OptionalTensor offsets, int64_t rho,
                               int64_t total_width) {
    const int64_t order = order_of(weight, bias);
    BackwardArguments arguments = backward_arguments(grad_y, x, scales, order, rho, true, Step::APPLY, total_width);
    arguments.parameters = make_parameters(x, weight, bias, pre_bias, row_scale, offsets);
    check_tensor(dots, "dots", ScalarType::Float, x);
    check_size(dots, "dots", x.size(0) * (order + 1));
    Tensor grad_x = torch::stable::empty_like(x);
    arguments.grad_x = grad_x.mutable_data_ptr();
    arguments.dots = data_or_null<float>(dots);
    Device::run(arguments, x, nullptr);
    return grad_x;
  }
};

template <typename Device>
void register_operators(torch::stable::detail::StableLibrary& library) {
  library.impl("polynomial", TORCH_BOX(&Operators<Device>::forward));
  library.impl("polynomial_backward", TORCH_BOX(&Operators<Device>::backward));
  library.impl("polynomial_sums", TORCH_BOX(&Operators<Device>::power_sums));
  library.impl("polynomial_from_sums", TORCH_BOX(&Operators<Device>::apply));
  library.impl("polynomial_backward_sums", TORCH_BOX(&Operators<Device>::row_dots));
  library.impl("polynomial_backward_from_sums", TORCH_BOX(&Operators<Device>::apply_backward));
}

}  // namespace polycom
