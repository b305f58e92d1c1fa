"""The polynomial activations as plain torch operations, with the frugal backward of steps.py.

Where more than a first gradient is asked for, the formula itself runs, slower, and torch differentiates it:
under the transforms of torch.func, and for gradients of gradients. Neither works on rows that are sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from polycom_ext.ops.calls import SHARDED, compute_dtype, group_size, transformed
from polycom_ext.ops.polynomial import steps
from polycom_ext.ops.polynomial.inputs import Inputs, Rho
from polycom_ext.ops.polynomial.steps import ascending, horner, rectify


class Steps(NamedTuple):
    """What computes: the functions of steps.py as they stand, or compiled."""

    forward: Callable[..., tuple[Tensor, Tensor | None]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]


PLAIN = Steps(steps.forward, steps.backward)


class _Polynomial(torch.autograd.Function):
    """y = sum_i a_i t_i + a_0 for every member of the family of steps.py, without variants."""

    @staticmethod
    def forward(
        ctx: Any, by: Steps, slope: Tensor | None, group: dist.ProcessGroup | None, *values: Any
    ) -> Tensor:
        inputs = Inputs(*values)
        y, scales = by.forward(inputs, slope, group)
        ctx.save_for_backward(inputs.x, inputs.weight, inputs.bias, slope, scales)
        ctx.by, ctx.group, ctx.options = by, group, (inputs.rho, inputs.normalize, inputs.eps)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, slope, scales = ctx.saved_tensors
        inputs = Inputs.of(tensors, ctx.options)
        if torch.is_grad_enabled():  # the gradient is to be differentiated in its turn

            def again(_: None, slope: Tensor | None, __: None, *tensors: Tensor) -> Tensor:
                return _formula(Inputs.of(tensors, ctx.options), slope, ctx.group)

            found = differentiable_gradients(ctx, again, (None, slope, None, *tensors), grad_output)
            return *found, None, None, None, None, None, None
        *found, grad_slope = ctx.by.backward(grad_output, inputs, slope, scales, ctx.group)
        return None, grad_slope, None, *found, None, None, None, None, None, None


def _formula(inputs: Inputs, slope: Tensor | None, group: dist.ProcessGroup | None) -> Tensor:
    """What `_Polynomial` computes, in operations that torch differentiates, batches and transforms itself."""
    if group_size(group) > 1:
        raise NotImplementedError(SHARDED)
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    # Not clamp, whose gradient at 0 is 1.
    relu = inputs.rho == Rho.RELU
    u = x.to(compute_dtype(x.dtype)).relu() if relu else rectify(x, inputs.rho, slope)
    a = ascending(weight, u.dtype)
    if not inputs.normalize:
        return horner([bias.to(u.dtype), *a], u).to(x.dtype)
    # Any sigma gives the same t_i = v^i / sqrt(mean(v^2i) + eps sigma^2i); floor makes it a constant.
    sigma = torch.exp2(-u.abs().amax(dim=-1, keepdim=True).clamp_min(1).log2().floor().clamp_max(126))
    v = u * sigma
    y, power, scale = bias.to(u.dtype), torch.ones_like(v), torch.ones_like(sigma)
    for coefficient in a:
        power, scale = power * v, scale * sigma.square()
        rms = (power.square().mean(dim=-1, keepdim=True) + inputs.eps * scale).sqrt()
        y = y + coefficient * (power / rms)
    return y.to(x.dtype)


def differentiable_gradients(
    ctx: Any, function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of function(*inputs), themselves differentiable, where `ctx` needs them."""
    needed = ctx.needs_input_grad[: len(inputs)]
    wanted = [tensor for tensor, needs in zip(inputs, needed, strict=True) if needs and tensor is not None]
    with torch.enable_grad():
        y = function(*inputs)
        found = iter(torch.autograd.grad(y, wanted, grad_output, create_graph=True, allow_unused=True))
    return tuple(next(found) if needs else None for needs in needed)


def expert_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """Index of each row's set of coefficients: the first whose end, offsets[e], lies beyond the row.

    It is the number of sets for rows past all ends, which are nobody's.
    """
    row = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, row, right=True)


def polynomial(
    inputs: Inputs,
    slope: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    by_formula: bool = False,
    by: Steps = PLAIN,
) -> Tensor:
    """Apply one member of the family; see the module's docstring, and functional.py for the variants."""

    def apply(inputs: Inputs) -> Tensor:
        if by_formula or transformed():
            return _formula(inputs, slope, group)
        y: Tensor = _Polynomial.apply(by, slope, group, *inputs)
        return y

    x, weight, bias, pre_bias, row_scale, offsets, *_ = inputs
    if pre_bias is None and row_scale is None and offsets is None:
        return apply(inputs)
    u = x.to(compute_dtype(x.dtype))
    if offsets is not None:
        expert = expert_of_rows(offsets, x.shape[0])
        owned = (expert < offsets.numel()).unsqueeze(1)
        expert = expert.clamp_max(offsets.numel() - 1)
        weight, bias = weight[expert], bias[expert]
        if row_scale is not None:
            row_scale = torch.where(owned.squeeze(1), row_scale, 0)
        if pre_bias is not None and pre_bias.dim() == 2:
            pre_bias = pre_bias[expert]
    if pre_bias is not None:
        u = u + pre_bias
    if offsets is not None:
        u = torch.where(owned, u, 0)
    y = apply(Inputs(u, weight, bias, None, None, None, inputs.rho, inputs.normalize, inputs.eps))
    if row_scale is not None:
        y = y * row_scale.unsqueeze(-1)
    if offsets is not None:
        y = torch.where(owned, y, 0)
    return y.to(x.dtype)
