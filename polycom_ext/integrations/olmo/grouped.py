"""`torch.nn.functional.grouped_mm` for rows of any length, and under torch.compile in any type.

torch asks for rows of a multiple of 16 bytes: others are padded with zeros, which changes no sum. It traces
bfloat16 only, although it computes every type: the others go through an operation of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT = 16
"""Bytes."""


def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows (n, k) sorted by group times their group's weight (groups, k, m): (n, m).

    `ends` (groups,), int32, says where each group's rows end; a group may be empty.
    """
    k, m = weight.shape[-2:]
    step = ALIGNMENT // rows.element_size()
    pad_k, pad_m = -k % step, -m % step
    if pad_k or pad_m:
        rows, weight = F.pad(rows, (0, pad_k)), F.pad(weight, (0, pad_m, 0, pad_k))
    traced = torch.compiler.is_compiling() and rows.dtype != torch.bfloat16
    y: Tensor = _forward(rows, weight, ends) if traced else F.grouped_mm(rows, weight, offs=ends)
    return y[:, :m]


@torch.library.custom_op("polycom_olmo::grouped_mm", mutates_args=())
def _forward(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, weight, offs=ends)


@_forward.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[-1])


@torch.library.custom_op("polycom_olmo::grouped_mm_backward", mutates_args=())
def _backward(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    return F.grouped_mm(grad, weight.mT, offs=ends), F.grouped_mm(rows.T, grad, offs=ends)


@_backward.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_backward(grad, *ctx.saved_tensors), None


_forward.register_autograd(_differentiate, setup_context=_setup)
