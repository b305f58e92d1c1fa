"""The fused operations as differentiable functions: whole rows in one operation, sharded rows in two.

A row that is sharded over a process group is summed locally, all-reduced (order float64 numbers a row
forward, order + 1 float32 numbers backward) and then applied.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from polycom_ext.ops.calls import all_reduce, group_size
from polycom_ext.ops.polynomial import library
from polycom_ext.ops.polynomial.eager import expert_of_rows
from polycom_ext.ops.polynomial.library import pre_bias_gradient, rows_and_parameters, split_coefficients
from polycom_ext.ops.polynomial.steps import Rho

_ops = torch.ops.polycom


class _Whole(torch.autograd.Function):
    """polycom::polynomial with its gradient, of tensors as they come: one node of the graph.

    The gradient that is registered, for torch.compile, is called in Python, which takes longer than the
    operation of a few rows.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with library.below_autograd():
            y, scales = _ops.polynomial(*rows_and_parameters(*inputs[:6]), *inputs[6:])
        library.keep(ctx, inputs, scales)
        return y.view(inputs[0].shape)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return library.backward(ctx, grad_y, None)


class _ThenLinear(torch.autograd.Function):
    """A linear layer of polycom::polynomial's y, which backward recomputes on its way instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *inputs_of_y, linear_weight, linear_bias = inputs
        y, scales = _ops.polynomial(*inputs_of_y)
        library.keep(ctx, inputs_of_y, scales, linear_weight, linear_bias)
        return torch.nn.functional.linear(y, linear_weight, linear_bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        linear_weight, linear_bias = ctx.saved_tensors[-2:]
        if torch.is_grad_enabled():  # the gradient is to be differentiated in its turn
            return library.by_formula(ctx, grad, (linear_weight, linear_bias))
        *_, needs_weight, needs_bias = ctx.needs_input_grad
        gradients, y = library.gradients(ctx, grad @ linear_weight, needs_weight)
        return *gradients, grad.T @ y if needs_weight else None, grad.sum(dim=0) if needs_bias else None


class _Sharded(torch.autograd.Function):
    """The function of rows of which every rank of a group holds an equal part.

    Normalised, x (backward: and the gradient of y) is read twice, before the all-reduce that every element of
    a row waits for and after it: 6 and 10 bytes an element of a 16-bit type, where a whole row takes 4 and 6.
    Between lie all the rows of a layer, which no cache holds.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        pre_bias: Tensor | None,
        row_scale: Tensor | None,
        offsets: Tensor | None,
        rho: int,
        normalize: bool,
        eps: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        if normalize:
            sums = all_reduce(_ops.polynomial_sums(x, pre_bias, offsets, rho, weight.shape[-1]), group)
            total_width = x.shape[1] * group_size(group)
            y, scales = _ops.polynomial_from_sums(
                x, weight, bias, sums, pre_bias, row_scale, offsets, rho, eps, total_width
            )
        else:
            y, scales = _ops.polynomial(x, weight, bias, pre_bias, row_scale, offsets, rho, False, eps)
        ctx.save_for_backward(x, weight, bias, scales, pre_bias, row_scale, offsets)
        ctx.rho, ctx.normalize, ctx.group = rho, normalize, group
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scales, pre_bias, row_scale, offsets = ctx.saved_tensors
        rho, group, grad_y = ctx.rho, ctx.group, grad_y.contiguous()
        if ctx.normalize:
            dots = _ops.polynomial_backward_sums(grad_y, x, scales, pre_bias, offsets, rho)
            grad_row_scale = _row_scale_gradient(dots, weight, bias, offsets)
            all_reduce(dots, group)
            coefficients = _coefficient_gradients(dots, bias.numel(), row_scale, offsets)
            total_width = x.shape[1] * group_size(group)
            grad_x = _ops.polynomial_backward_from_sums(
                grad_y, x, weight, bias, scales, dots, pre_bias, row_scale, offsets, rho, total_width
            )
        else:
            grad_x, coefficients, grad_row_scale, _ = _ops.polynomial_backward(
                grad_y, x, weight, bias, scales, pre_bias, row_scale, offsets, rho, False, False
            )
            all_reduce(coefficients, group)
        grad_weight, grad_bias = split_coefficients(coefficients, weight, bias)
        grad_pre_bias = None if pre_bias is None else pre_bias_gradient(grad_x, pre_bias, offsets)
        if row_scale is None:  # then the operations' answer is a placeholder
            return grad_x, grad_weight, grad_bias, grad_pre_bias, None, None, None, None, None, None
        return grad_x, grad_weight, grad_bias, grad_pre_bias, grad_row_scale, None, None, None, None, None


def _row_scale_gradient(dots: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor | None) -> Tensor:
    """sum_i a_i <g, t_i> of each row; dots[:, i] = <g, t_i>, i = 0..order."""
    coefficients = torch.cat((bias.reshape(-1, 1), weight.reshape(bias.numel(), -1).flip(1)), dim=1)
    if offsets is not None:
        coefficients = torch.cat(
            (coefficients, torch.zeros_like(coefficients[:1]))
        )  # of rows that are nobody's
        coefficients = coefficients[expert_of_rows(offsets, dots.shape[0])]
    return (dots * coefficients).sum(dim=1)


def _coefficient_gradients(
    dots: Tensor, experts: int, row_scale: Tensor | None, offsets: Tensor | None
) -> Tensor:
    """(experts, order + 1): each expert's sum of its rows' dots, powers descending and then the constant."""
    terms = dots.double() if row_scale is None else dots.double() * row_scale.double().unsqueeze(1)
    if offsets is None:
        sums = terms.sum(dim=0, keepdim=True)
    else:
        sums = terms.new_zeros((experts + 1, terms.shape[1]))  # the last of rows that are nobody's
        sums = sums.index_add_(0, expert_of_rows(offsets, dots.shape[0]), terms)[:experts]
    return sums.flip(1).float()


def polynomial(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    rho: Rho,
    normalize: bool,
    eps: float,
    group: dist.ProcessGroup | None,
    pre_bias: Tensor | None,
    row_scale: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """One member of the family by the compiled operations; arguments as in functional.py, already checked."""
    sharded, compiling = group_size(group) > 1, torch.compiler.is_compiling()
    if not sharded and not compiling:
        y = _Whole.apply(x, weight, bias, pre_bias, row_scale, offsets, int(rho), normalize, eps)
        return y
    inputs = rows_and_parameters(x, weight, bias, pre_bias, row_scale, offsets)
    if sharded:
        y = _Sharded.apply(*inputs, int(rho), normalize, eps, group)
    else:
        y, _ = _ops.polynomial(*inputs, int(rho), normalize, eps)
    return y.view(x.shape)


def polynomial_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    *,
    rho: Rho,
    normalize: bool,
    eps: float,
    pre_bias: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:
    """linear(polynomial(x)) without keeping the polynomial; whole rows, and x of linear_weight's type."""
    inputs = rows_and_parameters(x, weight, bias, pre_bias, row_scale, None)
    y = _ThenLinear.apply(*inputs, int(rho), normalize, eps, linear_weight, linear_bias)
    return y.view(*x.shape[:-1], linear_weight.shape[0])
