// The forward operation that quantizes y, with its checks; what CPU and CUDA have in common.
#pragma once

#include "operators.h"
#include "quantized_arguments.h"

namespace polycom {

// A quantizer's buffers, as quantized.Target; which of the options a recipe reads is said there.
#define POLYCOM_TARGET                                                                                        \
  "Tensor(a!) data, Tensor(b!) scale_inv, Tensor? scale, Tensor(c!)? amax, int recipe, bool power_of_two, " \
  "float epsilon, bool swizzled"

inline int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

inline bool lies_at(const void* pointer, uintptr_t multiple) { return reinterpret_cast<uintptr_t>(pointer) % multiple == 0; }

// Returns the row statistics, as forward does.
template <typename Device>
Tensor quantized(const Inputs& inputs, Tensor data, Tensor scale_inv, OptionalTensor scale, OptionalTensor amax,
                 int64_t recipe, bool power_of_two, double epsilon, bool swizzled) {
  const Tensor& x = inputs.x;
  QuantizedArguments arguments = {};
  arguments.forward = Operators<Device>::forward_arguments(inputs, Step::WHOLE);
  const int64_t rows = x.size(0), width = x.size(1);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 && inputs.order() == QUANTIZED_ORDER && !inputs.pre_bias,
                  "polycom: quantized results are of bfloat16, of order ", QUANTIZED_ORDER, ", without pre_bias");
  STD_TORCH_CHECK(width % 8 == 0 && width <= MAX_QUANTIZED_WIDTH, "polycom: the width must be a multiple of 8, at most ",
                  MAX_QUANTIZED_WIDTH);
  STD_TORCH_CHECK(recipe >= int(Recipe::TENSOR) && recipe <= int(Recipe::MX), "polycom: there is no recipe ", recipe);
  check_tensor(data, "data", ScalarType::Byte, x);
  check_size(data, "data", x.numel());
  STD_TORCH_CHECK(lies_at(x.const_data_ptr(), 16) && lies_at(data.const_data_ptr(), 8), "polycom: x or data is misaligned");
  Quantization& to = arguments.quantization;
  to.recipe = Recipe(recipe);
  to.data = data.mutable_data_ptr<uint8_t>();
  to.inverses = static_cast<uint8_t*>(scale_inv.mutable_data_ptr());
  to.power_of_two = power_of_two;
  to.epsilon = float(epsilon);
  to.swizzled = swizzled;
  if (to.recipe == Recipe::MX) {
    STD_TORCH_CHECK(width % 32 == 0, "polycom: the width must be a multiple of 32");
    check_tensor(scale_inv, "scale_inv", ScalarType::Byte, x);
    to.stride = pieces(width / 32, 4) * 4;
    check_size(scale_inv, "scale_inv", pieces(rows, 128) * 128 * to.stride);
  } else {
    check_tensor(scale_inv, "scale_inv", ScalarType::Float, x);
    to.stride = pieces(rows, 4) * 4;
    check_size(scale_inv, "scale_inv", to.recipe == Recipe::TENSOR ? 1 : pieces(width, 128) * to.stride);
  }
  if (to.recipe == Recipe::TENSOR) {
    STD_TORCH_CHECK(scale && amax, "polycom: scale and amax are missing");
    check_tensor(*scale, "scale", ScalarType::Float, x);
    check_tensor(*amax, "amax", ScalarType::Float, x);
    check_size(*scale, "scale", 1);
    check_size(*amax, "amax", 1);
    to.scale = scale->const_data_ptr<float>();
    to.largest = amax->mutable_data_ptr<float>();
  }
  Tensor scales = empty(x, {inputs.normalize ? rows : 0, inputs.order()}, ScalarType::Float);
  arguments.forward.scales = data_or_null<float>(scales);
  Device::run(arguments, x);
  return scales;
}

}  // namespace polycom
