"""The fused operations as differentiable functions: whole rows in one operation, sharded rows in two.

A row that is sharded over a process group is summed locally, all-reduced (order float64 numbers a row
forward, order + 1 float32 numbers backward) and then applied.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from polycom_ext.ops.calls import all_reduce, group_size
from polycom_ext.ops.polynomial import eager, library
from polycom_ext.ops.polynomial.eager import expert_of_rows
from polycom_ext.ops.polynomial.inputs import Inputs

_ops = torch.ops.polycom


class _Whole(torch.autograd.Function):
    """polycom::polynomial with its gradient, of tensors as they come: one node of the graph.

    The gradient that is registered, for torch.compile, is called in Python, which takes longer than the
    operation of a few rows.
    """

    @staticmethod
    def forward(ctx: Any, *values: Any) -> Tensor:
        inputs = Inputs(*values)
        with _below_autograd():
            y, scales = _ops.polynomial(*_as_rows(inputs))
        _keep(ctx, inputs, scales)
        return y.view(inputs.x.shape)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_y)


class _ThenLinear(torch.autograd.Function):
    """A linear layer of polycom::polynomial's y, which backward recomputes on its way, not keeps."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> Tensor:
        *of_y, linear_weight, linear_bias = values
        y, scales = _ops.polynomial(*of_y)
        _keep(ctx, Inputs(*of_y), scales, linear_weight, linear_bias)
        return torch.nn.functional.linear(y, linear_weight, linear_bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under activation checkpointing a second time is an error
        linear_weight, linear_bias = saved[-2:]
        if torch.is_grad_enabled():  # the gradient is to be differentiated in its turn
            return _by_formula(ctx, _kept(ctx, saved)[0], grad, (linear_weight, linear_bias))
        *_, needs_weight, needs_bias = ctx.needs_input_grad
        found, y = _gradients(ctx, *_kept(ctx, saved), grad @ linear_weight, needs_weight)
        return *found, grad.T @ y if needs_weight else None, grad.sum(dim=0) if needs_bias else None


class _Sharded(torch.autograd.Function):
    """The function of rows of which every rank of a group holds an equal part.

    Normalised, x (backward: and the gradient of y) is read twice, before the all-reduce that every element of
    a row waits for and after it: 6 and 10 bytes an element of a 16-bit type, where a whole row takes 4 and 6.
    Between lie all the rows of a layer, which no cache holds.
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *values: Any) -> Tensor:
        inputs = Inputs(*values)
        y, scales = _sharded(inputs, group)
        _keep(ctx, inputs, scales)
        ctx.group = group
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        inputs, scales = _kept(ctx, ctx.saved_tensors)
        return None, *_sharded_gradients(inputs, scales, grad_y.contiguous(), ctx.group)


def _sharded(inputs: Inputs, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    if not inputs.normalize:
        y, scales = _ops.polynomial(*inputs)
    else:
        sums = all_reduce(_ops.polynomial_sums(*inputs), group)
        y, scales = _ops.polynomial_from_sums(*inputs, sums, inputs.x.shape[1] * group_size(group))
    return y, scales


def _sharded_gradients(
    inputs: Inputs, scales: Tensor, grad_y: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor | None, ...]:
    if inputs.normalize:
        dots = _ops.polynomial_backward_sums(*inputs, grad_y, scales)
        grad_row_scale = _row_scale_gradient(dots, inputs)
        all_reduce(dots, group)
        coefficients = _coefficient_gradients(dots, inputs)
        total_width = inputs.x.shape[1] * group_size(group)
        grad_x = _ops.polynomial_backward_from_sums(*inputs, grad_y, scales, dots, total_width)
    else:
        grad_x, coefficients, grad_row_scale, _ = _ops.polynomial_backward(*inputs, grad_y, scales, False)
        all_reduce(coefficients, group)
    return _of_inputs(inputs, inputs.pre_bias is not None, grad_x, coefficients, grad_row_scale)


def _keep(ctx: Any, inputs: Inputs, scales: Tensor, *more: Tensor) -> None:
    """Save what `_gradients` needs: the inputs, and order floats a row; after these, `more`."""
    ctx.save_for_backward(*inputs.tensors, scales, *more)
    ctx.options = inputs.options


def _kept(ctx: Any, saved: tuple[Any, ...]) -> tuple[Inputs, Tensor]:
    *tensors, scales = saved[:7]
    return Inputs.of(tensors, ctx.options), scales


def _backward(ctx: Any, grad_y: Tensor, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """As autograd calls it; the second output of polycom::polynomial, the scales, has no gradient."""
    inputs, scales = _kept(ctx, ctx.saved_tensors)
    if torch.is_grad_enabled():  # the gradient is to be differentiated in its turn
        return _by_formula(ctx, inputs, grad_y)
    return _gradients(ctx, inputs, scales, grad_y, False)[0]


def _gradients(
    ctx: Any, inputs: Inputs, scales: Tensor, grad_y: Tensor, recompute: bool
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """The gradient of every input, and y if it is to be recomputed."""
    grad_y = grad_y.reshape(-1, inputs.x.shape[-1]).contiguous()
    with _below_autograd():
        *found, y = _ops.polynomial_backward(*_as_rows(inputs), grad_y, scales, recompute)
    return _of_inputs(inputs, ctx.needs_input_grad[3], *found), y


def _of_inputs(
    inputs: Inputs, pre_bias: bool, grad_x: Tensor, coefficients: Tensor, grad_row_scale: Tensor
) -> tuple[Tensor | None, ...]:
    """The operations' answers in the shapes of the inputs, and None for the options; pre_bias's if needed.

    coefficients: (experts, order + 1), powers descending, then the constant. grad_row_scale is a placeholder
    where there is no row_scale.
    """
    powers, constant = coefficients.split((inputs.order, 1), dim=1)
    return (
        grad_x.view(inputs.x.shape),
        powers.reshape(inputs.weight.shape),
        constant.reshape(inputs.bias.shape),
        _pre_bias_gradient(grad_x, inputs) if pre_bias else None,
        None if inputs.row_scale is None else grad_row_scale.view(inputs.row_scale.shape),
        *(None,) * 4,
    )


def _by_formula(
    ctx: Any, inputs: Inputs, grad_output: Tensor, linear: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor | None, ...]:
    """The gradient of every input, and of a linear layer behind, in a form that can be differentiated."""

    def formula(*values: Any) -> Tensor:
        *tensors, _, _, _, _ = values[:9]
        y = eager.polynomial(Inputs.of((*tensors, inputs.offsets), inputs.options), by_formula=True)
        return torch.nn.functional.linear(y, *values[9:]) if linear else y

    differentiable = (*inputs.tensors[:5], None, None, None, None, *(linear or ()))
    return eager.differentiable_gradients(ctx, formula, differentiable, grad_output)


def _pre_bias_gradient(grad_x: Tensor, inputs: Inputs) -> Tensor:
    """The sum of grad_x over the rows that a bias was added to, formed in float32."""
    pre_bias, offsets = inputs.pre_bias, inputs.offsets
    assert pre_bias is not None
    if pre_bias.dim() == 1:
        # Into another type torch converts all of grad_x first, which takes longer than the sum.
        same = pre_bias.dtype == grad_x.dtype
        return grad_x.sum(dim=0, dtype=None if same else torch.float32)
    assert offsets is not None
    expert = expert_of_rows(offsets, grad_x.shape[0])
    sums = grad_x.new_zeros((offsets.numel() + 1, pre_bias.shape[1]), dtype=torch.float32)
    return sums.index_add_(0, expert, grad_x.float())[:-1]  # the last of rows that are nobody's


def _row_scale_gradient(dots: Tensor, inputs: Inputs) -> Tensor:
    """sum_i a_i <g, t_i> of each row; dots[:, i] = <g, t_i>, i = 0..order."""
    experts = inputs.bias.numel()
    coefficients = torch.cat((inputs.bias.reshape(-1, 1), inputs.weight.reshape(experts, -1).flip(1)), dim=1)
    if inputs.offsets is not None:
        nobodys = torch.zeros_like(coefficients[:1])
        coefficients = torch.cat((coefficients, nobodys))[expert_of_rows(inputs.offsets, dots.shape[0])]
    return (dots * coefficients).sum(dim=1)


def _coefficient_gradients(dots: Tensor, inputs: Inputs) -> Tensor:
    """(experts, order + 1): each expert's sum of its rows' dots, powers descending and then the constant."""
    scale, offsets, experts = inputs.row_scale, inputs.offsets, inputs.bias.numel()
    terms = dots.double() if scale is None else dots.double() * scale.double().unsqueeze(1)
    if offsets is None:
        sums = terms.sum(dim=0, keepdim=True)
    else:
        sums = terms.new_zeros((experts + 1, terms.shape[1]))  # the last of rows that are nobody's
        sums = sums.index_add_(0, expert_of_rows(offsets, dots.shape[0]), terms)[:experts]
    return sums.flip(1).float()


def _below_autograd() -> AbstractContextManager[object]:
    """For operations within an autograd function: theirs, in Python, would take longer than a few rows do."""
    guard = None if torch.compiler.is_compiling() else getattr(torch._C, "_AutoDispatchBelowAutograd", None)
    return nullcontext() if guard is None else guard()  # a private name that a later torch may lack


def _as_rows(inputs: Inputs) -> Inputs:
    """As the operations take them: (rows, width), and float32 or int32 parameters, all contiguous."""
    x, weight, bias, pre_bias, row_scale, offsets, rho, normalize, eps = inputs
    return Inputs(
        x.reshape(-1, x.shape[-1]).contiguous(),
        weight.float().contiguous(),
        bias.float().contiguous(),
        None if pre_bias is None else pre_bias.float().contiguous(),
        None if row_scale is None else row_scale.float().reshape(-1).contiguous(),
        None if offsets is None else offsets.to(torch.int32).contiguous(),
        int(rho),
        normalize,
        eps,
    )


def polynomial(inputs: Inputs, group: dist.ProcessGroup | None) -> Tensor:
    """One member of the family by the compiled operations."""
    sharded = group_size(group) > 1
    if not sharded and not torch.compiler.is_compiling():
        whole: Tensor = _Whole.apply(*inputs)
        return whole
    rows = _as_rows(inputs)
    y: Tensor = _Sharded.apply(group, *rows) if sharded else _ops.polynomial(*rows)[0]
    return y.view(inputs.x.shape)


def polynomial_linear(inputs: Inputs, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """linear(polynomial(x)) without keeping the polynomial; whole rows, and x of linear_weight's type."""
    y: Tensor = _ThenLinear.apply(*_as_rows(inputs), linear_weight, linear_bias)
    return y.view(*inputs.x.shape[:-1], linear_weight.shape[0])


def forward(inputs: Inputs, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """y and what `backward` needs beside the inputs, for those who keep the graph of a model themselves."""
    rows = _as_rows(inputs)
    with _below_autograd():
        y, scales = _ops.polynomial(*rows) if group_size(group) == 1 else _sharded(rows, cast(Any, group))
    return y.view(inputs.x.shape), scales


def backward(
    inputs: Inputs,
    scales: Tensor,
    grad_y: Tensor,
    group: dist.ProcessGroup | None = None,
    recompute: bool = False,
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """The gradient of each tensor of `inputs`, and y if it is to be recomputed.

    Where rows are sharded, recomputing reduces their sums once more.
    """
    rows, shape = _as_rows(inputs), inputs.x.shape
    grad_y = grad_y.reshape(rows.x.shape).contiguous()
    y: Tensor | None = None
    with _below_autograd():
        if group_size(group) > 1:
            found = _sharded_gradients(rows, scales, grad_y, cast(Any, group))
            y = _sharded(rows, cast(Any, group))[0] if recompute else None
        else:
            *parts, again = _ops.polynomial_backward(*rows, grad_y, scales, recompute)
            found = _of_inputs(rows, rows.pre_bias is not None, *parts)
            y = again if recompute else None
    shaped = zip(found, inputs.tensors, strict=False)
    gradients = tuple(None if one is None or of is None else one.view(of.shape) for one, of in shaped)
    return gradients, None if y is None else y.view(shape)


def quantized(inputs: Inputs, *target: Any) -> Tensor:
    """Fill `target`'s buffers, in the order of the operator's schema, with y; the rest is as forward's."""
    with _below_autograd():
        scales: Tensor = _ops.polynomial_quantized(*_as_rows(inputs), *target)
    return scales


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """As autograd calls it."""
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    _keep(ctx, Inputs(*inputs), output[1])


if library.devices:
    torch.library.register_autograd("polycom::polynomial", _backward, setup_context=_setup_context)
