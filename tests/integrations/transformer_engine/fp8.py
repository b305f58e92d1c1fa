"""Transformer Engine's FP8 kernels by torch: of delayed scaling, of blocks of 128 and of MXFP8.

As in kernels.py; what they read and write are TE's own tensors, told by their class's name, as whoever calls
this imports TE.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

FORMATS = {"kFloat8E4M3": torch.float8_e4m3fn, "kFloat8E5M2": torch.float8_e5m2}
BLOCK, MX_BLOCK = 128, 32


def create_empty_quantized_tensor(
    quantizer: Any, shape: Any, dtype: torch.dtype, device: torch.device, pin_memory: bool
) -> Any:
    """By the quantizer's own description of what it fills; that of delayed scaling has current scaling's."""
    module = importlib.import_module("transformer_engine.pytorch.tensor.float8_tensor")
    describes: Any = type(quantizer)
    if describes is module.Float8Quantizer:
        describes = module.Float8CurrentScalingQuantizer
    specs, made = describes.inner_tensor_specs(quantizer, shape), describes.storage_metadata(quantizer, dtype)
    inner = {name: torch.empty(size, dtype=kind) for name, (size, kind) in specs.items()}
    context = {**made, "is_tensor": not quantizer.internal, "requires_grad": False}
    strides = torch.empty(shape, device="meta").stride()
    return made["cls"].__tensor_unflatten__(inner, context, shape, strides)


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    with torch.no_grad():
        tensor = tensor.detach()
        if output is None:
            output = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        rows = tensor.reshape(-1, tensor.shape[-1]).float()
        of_kind[type(quantizer).__name__](rows, quantizer, output)
    return output


def split_quantize(
    tensor: Tensor,
    split_sections: list[int],
    quantizer_list: list[Any],
    disable_bulk_allocation: bool = False,
) -> list[Any]:
    parts = tensor.split(split_sections)
    return [quantizer(part) for part, quantizer in zip(parts, quantizer_list, strict=True)]


def fp8_transpose(input: Tensor, dtype: Any, *, out: Tensor | None) -> Tensor:
    transposed = input.reshape(-1, input.shape[-1]).T.contiguous()
    return transposed if out is None else out.copy_(transposed.view(out.shape))


def dequantize(input: Any, otype: Any) -> Tensor:
    """Of MXFP8; TE's own Python does it for the others on a CPU."""
    of_rows = input._rowwise_data is not None
    data = input._rowwise_data if of_rows else input._columnwise_data
    lines = data.reshape(-1, data.shape[-1])
    scale_inv = input._rowwise_scale_inv if of_rows else input._columnwise_scale_inv.T
    if of_rows and input._with_gemm_swizzled_scales:
        scale_inv = _compact(scale_inv)
    lines = lines if of_rows else lines.T
    blocks = lines.unflatten(1, (lines.shape[1] // MX_BLOCK, MX_BLOCK))
    exponents = scale_inv[: blocks.shape[0], : blocks.shape[1]].double() - 127
    numbers = blocks.view(FORMATS[input._fp8_dtype.name]).double() * torch.exp2(exponents).unsqueeze(-1)
    numbers = numbers.view(lines.shape)
    dtype = getattr(input, "_dtype", torch.float32)
    return (numbers if of_rows else numbers.T).reshape(data.shape).to(dtype)


def plain(tensor: Any) -> Tensor:
    """What a matrix product multiplies."""
    if type(tensor).__name__.startswith("MXFP8"):
        return dequantize(tensor, None)
    return tensor.dequantize() if hasattr(tensor, "dequantize") and _is_quantized(tensor) else tensor


def _is_quantized(tensor: Any) -> bool:
    return type(tensor).__module__.startswith("transformer_engine")


def _cast(numbers: Tensor, dtype: Any) -> Tensor:
    kind = FORMATS[dtype.name]
    largest = torch.finfo(kind).max
    return numbers.clamp(-largest, largest).to(kind).view(torch.uint8)


def _by_a_known_scale(rows: Tensor, quantizer: Any, out: Any) -> None:
    data = _cast(rows * quantizer.scale, quantizer.dtype)
    if rows.numel():  # of an expert without tokens there are none
        quantizer.amax.copy_(torch.maximum(quantizer.amax, rows.abs().max()))
    out._scale_inv.copy_(quantizer.scale.reciprocal())
    if out._data is not None:
        out._data.copy_(data.view(out._data.shape))
    if out._transpose is not None:
        out._transpose.copy_(data.T.reshape(out._transpose.shape))
        out._transpose_invalid = False


def _by_blocks(rows: Tensor, quantizer: Any, out: Any) -> None:
    height = BLOCK if quantizer.block_scaling_dim == 2 else 1
    for lines, data, scale_inv in (
        (rows, out._rowwise_data, out._rowwise_scale_inv),
        (rows.T, out._columnwise_data, out._columnwise_scale_inv),
    ):
        if data is None:
            continue
        count, width = lines.shape
        padded = torch.nn.functional.pad(lines, (0, -width % BLOCK, 0, -count % height))
        tiles = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // BLOCK, BLOCK)
        largest = tiles.abs().amax(dim=(1, 3)).clamp_min(quantizer.amax_epsilon)
        scale = torch.finfo(FORMATS[quantizer.dtype.name]).max / largest
        if quantizer.force_pow_2_scales:
            scale = torch.exp2(scale.log2().floor())
        scale = torch.where(largest == 0, 1.0, scale)
        cast = _cast(tiles * scale[:, None, :, None], quantizer.dtype).view(padded.shape)
        data.copy_(cast[:count, :width].reshape(data.shape))
        inverse = scale.reciprocal() if height == BLOCK else scale.reciprocal().T
        scale_inv.zero_()[: inverse.shape[0], : inverse.shape[1]] = inverse


def _by_mx_blocks(rows: Tensor, quantizer: Any, out: Any) -> None:
    for lines, data, scale_inv, of_rows in (
        (rows, out._rowwise_data, out._rowwise_scale_inv, True),
        (rows.T, out._columnwise_data, out._columnwise_scale_inv, False),
    ):
        if data is None:
            continue
        blocks = lines.unflatten(1, (lines.shape[1] // MX_BLOCK, MX_BLOCK))
        largest = torch.finfo(FORMATS[quantizer.dtype.name]).max
        exponent = (blocks.abs().amax(dim=2) / largest).log2().ceil().clamp(-127, 127)
        cast = _cast(blocks * torch.exp2(-exponent).unsqueeze(-1), quantizer.dtype).view(lines.shape)
        data.copy_((cast if of_rows else cast.T).reshape(data.shape))
        biased = torch.zeros(scale_inv.shape if of_rows else scale_inv.T.shape, dtype=torch.uint8)
        biased[: exponent.shape[0], : exponent.shape[1]] = (exponent + 127).to(torch.uint8)
        if of_rows and out._with_gemm_swizzled_scales:
            biased = _swizzled(biased)
        scale_inv.copy_(biased if of_rows else biased.T)


def _swizzled(exponents: Tensor) -> Tensor:
    """As matrix products read them: tiles of 128 rows and 4 blocks, rows r, r + 32, r + 64, r + 96 beside."""
    rows, blocks = exponents.shape
    return exponents.view(rows // 128, 4, 32, blocks // 4, 4).permute(0, 3, 2, 1, 4).reshape(rows, blocks)


def _compact(exponents: Tensor) -> Tensor:
    rows, blocks = exponents.shape
    return exponents.view(rows // 128, blocks // 4, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(rows, blocks)


of_kind = {
    "Float8Quantizer": _by_a_known_scale,
    "Float8BlockQuantizer": _by_blocks,
    "MXFP8Quantizer": _by_mx_blocks,
}
KERNELS = (create_empty_quantized_tensor, quantize, dequantize, split_quantize, fp8_transpose)
