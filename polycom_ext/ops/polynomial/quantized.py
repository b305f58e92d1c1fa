"""The polynomial activations with y in FP8, in the buffers of Transformer Engine's quantizers.

Its bytes are those that the quantizer makes of y as `polynomial` returns it, rounded to x's type: for delayed
scaling, for blocks of 1x128 and row-wise MXFP8, in E4M3, the format of every recipe's forward. One kernel
does both where `problem` has nothing to say, and moves 3 bytes an element where two kernels move 7; plain
operations do the same elsewhere. Per-tensor current scaling cannot be had in one pass: the scale is known
after the last row.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from polycom_ext.ops.polynomial import dispatch, fused
from polycom_ext.ops.polynomial.inputs import Inputs

ORDER = 3
MAX_WIDTH = 32768
"""Of rows that a kernel holds whole."""
LARGEST_E4M3 = 448.0
_NAN = 0x7F


class Recipe(IntEnum):
    """How numbers share a scale; the same numbers as in csrc/quantized_arguments.h."""

    TENSOR = 0
    """All of them, the scale being known before: delayed scaling."""
    BLOCKS = 1
    """128 of a row."""
    MX = 2
    """32 of a row, scales being powers of two: row-wise MXFP8."""


BLOCK = {Recipe.BLOCKS: 128, Recipe.MX: 32}
_CAPABILITY = {Recipe.TENSOR: (8, 9), Recipe.BLOCKS: (8, 9), Recipe.MX: (10, 0)}


class Target(NamedTuple):
    """A quantizer's row-wise buffers and options; all contiguous, on x's device.

    data: uint8, x's shape. scale_inv: TENSOR float32 (1,); BLOCKS float32 (ceil(width / 128), rows rounded up
    to 4); MX uint8 (rows rounded up to 128, width / 32 rounded up to 4), biased exponents. TENSOR: scale
    float32 (1,), and amax float32 (1,), which is raised to max |y|. BLOCKS: whether scales are powers of two,
    and the least that counts as a block's max |y|. MX: whether scale_inv is in the order that matrix
    multiplications read.
    """

    recipe: Recipe
    data: Tensor
    scale_inv: Tensor
    scale: Tensor | None = None
    amax: Tensor | None = None
    power_of_two: bool = True
    epsilon: float = 0.0
    swizzled: bool = False


def scale_shape(recipe: Recipe, rows: int, width: int) -> tuple[int, ...]:
    """Of Target.scale_inv."""
    if recipe == Recipe.TENSOR:
        return (1,)
    blocks = -(-width // BLOCK[recipe])
    if recipe == Recipe.BLOCKS:
        return blocks, -(-rows // 4) * 4
    return -(-rows // 128) * 128, -(-blocks // 4) * 4


def problem(inputs: Inputs, target: Target) -> str:
    """Why one kernel does not serve a call, in a sentence; nothing if it does."""
    x, width = inputs.x, inputs.x.shape[-1]
    if inputs.pre_bias is not None:
        return "a bias before the activation is not fused with quantisation"
    if x.dtype != torch.bfloat16 or inputs.order != ORDER:
        return f"quantisation is fused for bfloat16 and order {ORDER}, not {x.dtype} and order {inputs.order}"
    piece = 32 if target.recipe == Recipe.MX else 8
    if width % piece or width > MAX_WIDTH:
        return (
            f"quantisation is fused for widths that are a multiple of {piece}, up to {MAX_WIDTH}, not {width}"
        )
    if (x.is_contiguous() and x.data_ptr() % 16) or target.data.data_ptr() % 8:
        return "x or the quantizer's data begins at an address that no vector can be read from"
    if not _is_fused(inputs):
        return f"the fused operations do not run on {x.device}"
    needed = _CAPABILITY[target.recipe]
    if x.device.type == "cuda" and (found := torch.cuda.get_device_capability(x.device)) < needed:
        return f"{x.device} has compute capability {_dotted(found)}, and this format needs {_dotted(needed)}"
    return ""


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


@torch.no_grad()
def forward(inputs: Inputs, target: Target) -> Tensor:
    """Fill `target` with y, and return what `backward` needs beside the inputs.

    Raises ValueError for buffers of other shapes or types than Target says.
    """
    rows, width = inputs.x.numel() // inputs.x.shape[-1], inputs.x.shape[-1]
    _check(inputs, target, rows, width)
    blocks = 0 if target.recipe == Recipe.TENSOR else rows * -(-width // BLOCK[target.recipe])
    if blocks and blocks < target.scale_inv.numel():
        target.scale_inv.zero_()  # the padding, which the quantizer leaves as it is or fills later
    if not problem(inputs, target):
        recipe, *buffers_and_options = target
        buffers, options = buffers_and_options[:4], buffers_and_options[4:]
        return fused.quantized(inputs, *buffers, int(recipe), *options)
    if _is_fused(inputs):
        y, kept = fused.forward(inputs)
    else:
        y, kept = dispatch.polynomial(inputs), inputs.x.new_empty(0, inputs.order, dtype=torch.float32)
    quantize(y.reshape(rows, width), target)
    return kept


def backward(inputs: Inputs, kept: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias, pre_bias and row_scale; None of what was not given."""
    if _is_fused(inputs):
        with torch.no_grad():
            return fused.backward(inputs, kept, grad_y)[0][:5]
    with torch.enable_grad():
        *tensors, offsets = (None if t is None else t.detach() for t in inputs.tensors)
        given = [tensor.requires_grad_() for tensor in tensors if tensor is not None]
        y = dispatch.polynomial(Inputs.of((*tensors, offsets), inputs.options))
        found = iter(torch.autograd.grad(y, given, grad_y.reshape(y.shape)))
    return tuple(None if tensor is None else next(found) for tensor in tensors)


def _is_fused(inputs: Inputs) -> bool:
    return dispatch.path_of(inputs) is dispatch.Path.FUSED


def _check(inputs: Inputs, target: Target, rows: int, width: int) -> None:
    if target.data.dtype != torch.uint8 or target.data.numel() != inputs.x.numel():
        raise ValueError(f"data must be uint8 of {inputs.x.numel()} numbers, got {_said(target.data)}")
    kind = torch.uint8 if target.recipe == Recipe.MX else torch.float32
    shape = scale_shape(target.recipe, rows, width)
    if target.scale_inv.dtype != kind or target.scale_inv.numel() != torch.Size(shape).numel():
        raise ValueError(f"scale_inv must be {kind} of shape {shape}, got {_said(target.scale_inv)}")
    if target.recipe == Recipe.TENSOR and (target.scale is None or target.amax is None):
        raise ValueError("delayed scaling needs the quantizer's scale and amax")
    if target.recipe == Recipe.MX and width % BLOCK[Recipe.MX]:
        raise ValueError(f"MXFP8 needs a width that is a multiple of 32, got {width}")


def _said(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def quantize(y: Tensor, target: Target) -> None:
    """Fill `target` with y, (rows, width), by plain operations: the rules in readable form.

    Scales look past a NaN, whose own byte is NaN.
    """
    u = y.float()
    if target.recipe == Recipe.TENSOR:
        assert target.scale is not None
        assert target.amax is not None
        target.data.copy_(_bytes(u * target.scale).view(target.data.shape))
        target.scale_inv.copy_(target.scale.reciprocal())
        if u.numel():
            target.amax.copy_(torch.maximum(target.amax, _magnitude(u).amax()))
        return
    rows, width = y.shape
    block = BLOCK[target.recipe]
    u = torch.nn.functional.pad(u, (0, -width % block)).view(rows, -1, block)
    largest = _magnitude(u).amax(dim=-1)
    if target.recipe == Recipe.BLOCKS:
        scale = _block_scale(largest, target, torch.finfo(y.dtype).max)
        target.scale_inv.view(largest.shape[1], -1)[:, :rows] = scale.reciprocal().T
    else:
        exponent = _block_exponent(largest)
        scale = torch.exp2(127.0 - exponent.double()).float()
        padded = scale_shape(target.recipe, rows, width)
        exponents = target.scale_inv.view(padded).zero_()
        exponents[:rows, : largest.shape[1]] = exponent
        if target.swizzled:
            exponents.copy_(_swizzled(exponents))
    data = _bytes(u * scale.unsqueeze(-1)).view(rows, -1)[:, :width]
    target.data.copy_(data.reshape(target.data.shape))


def _magnitude(u: Tensor) -> Tensor:
    return u.abs().nan_to_num(0.0, torch.inf)


def _bytes(scaled: Tensor) -> Tensor:
    """E4M3, rounded to nearest even, within +-448; NaN without a sign."""
    data = scaled.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(scaled.isnan(), _NAN, data)


def _block_scale(largest: Tensor, target: Target, instead_of_infinity: float) -> Tensor:
    largest = largest.clamp_min(target.epsilon)
    scale = (
        torch.full_like(largest, LARGEST_E4M3) / largest
    )  # not of a number, which torch multiplies with the inverse
    scale = torch.where(scale.isinf(), instead_of_infinity, scale)
    if target.power_of_two:
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    return torch.where((largest == 0) | largest.isinf(), 1.0, scale)


def _block_exponent(largest: Tensor) -> Tensor:
    """Of the least power of two by which a block must be divided to lie within +-448, plus 127."""
    mantissa, exponent = torch.frexp(largest * torch.tensor(1 / LARGEST_E4M3))
    biased = (exponent + 127 - (mantissa == 0.5).int()).clamp(0, 254)
    return torch.where(largest == 0, 0, torch.where(largest.isinf(), 254, biased)).to(torch.uint8)


def _swizzled(exponents: Tensor) -> Tensor:
    """Tiles of 128 rows and 4 blocks one after the other; in a tile row r + 32 q is at 16 r + 4 q."""
    rows, blocks = exponents.shape
    tiles = exponents.view(rows // 128, 4, 32, blocks // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, blocks)
