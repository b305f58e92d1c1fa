"""An activation and the quantisation of its result in one kernel, where one pass over rows makes the bytes.

Scales of delayed scaling are known before; those of 1x128 blocks and of MXFP8's rows need a row only. Where
the column-wise form is asked for too, blocks and MXFP8 have scales over 128 or 32 rows, which no pass over
rows can make: then y is formed, and the quantizer reads it. Delayed scaling's is the transposed bytes: TE's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

from polycom_ext.ops.polynomial import quantized
from polycom_ext.ops.polynomial.inputs import Inputs
from polycom_ext.ops.polynomial.quantized import Recipe, Target

E4M3 = "kFloat8E4M3"


def forward(inputs: Inputs, quantizer: Any) -> tuple[Any, Tensor] | None:
    """y as `quantizer` gives it, and what backward needs; None where y has to be formed first."""
    recipe = _recipe(quantizer)
    if recipe is None or inputs.pre_bias is not None or not quantizer.is_quantizable(inputs.x):
        return None
    out = quantizer.make_empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device)
    target = _target(out, quantizer, recipe)
    if quantized.problem(inputs, target):
        return None
    kept = quantized.forward(inputs, target)
    if recipe is Recipe.TENSOR and quantizer.columnwise_usage and not is_non_tn_fp8_gemm_supported():
        out._create_transpose()
    return out, kept


def _recipe(quantizer: Any) -> Recipe | None:
    """How one pass over rows makes all that the quantizer is asked for, if it can."""
    if getattr(getattr(quantizer, "dtype", None), "name", "") != E4M3 or not quantizer.rowwise_usage:
        return None
    if isinstance(quantizer, Float8Quantizer):
        return Recipe.TENSOR
    if quantizer.columnwise_usage:
        return None
    if isinstance(quantizer, Float8BlockQuantizer) and quantizer.block_scaling_dim == 1:
        return Recipe.BLOCKS
    if isinstance(quantizer, MXFP8Quantizer) and not getattr(quantizer, "with_2d_quantization", False):
        return Recipe.MX
    return None


def _target(out: Any, quantizer: Any, recipe: Recipe) -> Target:
    if recipe is Recipe.TENSOR:
        return Target(recipe, out._data, out._scale_inv, quantizer.scale, quantizer.amax)
    data, scale_inv = out._rowwise_data, out._rowwise_scale_inv
    if recipe is Recipe.MX:
        return Target(recipe, data, scale_inv, swizzled=getattr(out, "_with_gemm_swizzled_scales", False))
    power_of_two, epsilon = quantizer.force_pow_2_scales, quantizer.amax_epsilon
    return Target(recipe, data, scale_inv, power_of_two=power_of_two, epsilon=epsilon)
