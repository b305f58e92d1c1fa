"""Element-wise activations by their formula, for any that has learnable scalars.

The formula is formed in float32 (float64 for float64 input), and torch differentiates it. Only x and the
scalars are kept for backward, which forms it again: a chain of plain operations would keep several float32
tensors of x's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from polycom_ext.ops.calls import SHARDED, all_reduce, compute_dtype, group_size, transformed


class _Complete(torch.autograd.Function):
    """The parameter itself; its gradient is summed over the ranks that share it."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad_output.clone(), ctx.group), None


def complete(parameter: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A parameter whose gradient is complete on every rank of `group`; each applies it to its shard.

    Raises NotImplementedError under torch.func, unless the group is one rank.
    """
    if group is None or group_size(group) == 1:
        return parameter
    if transformed():
        raise NotImplementedError(SHARDED)
    completed: Tensor = _Complete.apply(parameter, group)
    return completed


class _Recomputed(torch.autograd.Function):
    """formula(x, *parameters), of which only the inputs are kept."""

    @staticmethod
    def forward(ctx: Any, formula: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.formula = formula
        return _widened(formula, x, *parameters)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # the gradient is to be differentiated in its turn
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            # As views, so that hooks on the parameters see their gradient once.
            inputs = [tensor.view_as(tensor) for tensor in ctx.saved_tensors]
            y = _widened(ctx.formula, *inputs)
            wanted = [tensor for tensor, needs in zip(inputs, needed, strict=True) if needs]
            found = iter(torch.autograd.grad(y, wanted, grad_output, create_graph=again))
        return None, *(next(found) if needs else None for needs in needed)


def _widened(formula: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
    return formula(x.to(compute_dtype(x.dtype)), *parameters).to(x.dtype)


def elementwise(
    formula: Callable[..., Tensor],
    x: Tensor,
    *parameters: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """formula(x, *parameters) of each element of x, in x's type; the formula gets float32 (or float64).

    Args:
        x: any shape; float16, bfloat16, float32 or float64.
        parameters: (1,), shared by all elements.
        group: process group over which x is sharded; gradients of the parameters are summed over it.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    for parameter in parameters:
        if parameter.shape != (1,):
            raise ValueError(f"a learnable scalar must have shape (1,), got {tuple(parameter.shape)}")
    wide = compute_dtype(x.dtype)
    shared = [complete(parameter.to(wide), group) for parameter in parameters]
    if transformed() or torch.compiler.is_compiling():
        return _widened(formula, x, *shared)
    y: Tensor = _Recomputed.apply(formula, x, *shared)
    return y
