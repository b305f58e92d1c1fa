"""The polynomial activations as plain torch operations with a hand-written, frugal backward.

One family covers all four activations: with u = rho(x),

    y = sum_i a_i t_i + a_0,    t_i = u^i            (PolyReLU, PolyPReLU)
                                t_i = u^i / rms(u^i)  (PolyNorm, PolyReLUNorm)

As in csrc/polynomial.h, a row of the normalised ones has a power of two sigma <= 1 near 1 / rms(u), so that
t_i = s_i v^i with v = sigma u and s_i = 1 / rms(v^i): no power of a large u is ever formed, and nothing
overflows whose result is finite. Kept for backward: x, and r numbers a row, 1 / rms(u) and s_2, ..., s_r.
Everything else is recomputed. Arithmetic is float32 (float64 for float64 input), whatever the storage type.

Where more than a first gradient is asked for, the formula itself runs, slower, and torch differentiates it:
under the transforms of torch.func, and for gradients of gradients. Neither works on rows that are sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Rho(IntEnum):
    """What is applied to x before the powers are formed."""

    IDENTITY = 0
    RELU = 1
    PRELU = 2


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_size(group: dist.ProcessGroup | None) -> int:
    """Number of ranks that share a row; 1 without a group."""
    return 1 if group is None else group.size()


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum in place over the ranks that share a row."""
    if group_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def _rectify(x: Tensor, rho: Rho, slope: Tensor | None) -> Tensor:
    x = x.to(compute_dtype(x.dtype))
    if rho is Rho.RELU:
        return x.clamp(min=0)
    if rho is Rho.PRELU:
        assert slope is not None
        return torch.where(x > 0, x, slope.to(x.dtype) * x)
    return x


def _row_scales(u: Tensor, order: int, eps: float, group: dist.ProcessGroup | None) -> Tensor:
    """1 / rms(u), s_2, ..., s_r of each row: shape (*rows, order), u's type.

    The sums are formed on u divided by a power of two near its row maximum and put back together in float64,
    as those of u / 2^16, in which the eighth power of any float32 is finite, summed over any width; so one
    all-reduce serves a row that is sharded over a group.
    """
    exponent = torch.frexp(u.abs().amax(dim=-1, keepdim=True).clamp_min(1)).exponent
    square = torch.ldexp(u, -exponent).square()
    sums, power = [], square
    for i in range(order):
        if i:
            power = power * square
        sums.append(power.sum(dim=-1))
    powers = torch.arange(1, order + 1, device=u.device, dtype=torch.float64)
    total = torch.stack(sums, dim=-1).double() * torch.exp2(2.0 * (exponent - 16) * powers)
    mean = all_reduce(total, group) / (u.shape[-1] * group_size(group))
    units = torch.exp2(-16 * powers)
    scales = (mean + eps * units.square()).rsqrt() * units
    first = scales[..., :1].to(u.dtype)
    rest = scales[..., 1:] / _sigma(first).double().pow(powers[1:])
    return torch.cat((first, rest.to(u.dtype)), dim=-1)


def _sigma(first: Tensor) -> Tensor:
    """The largest power of two that is at most `first`, within [2^-126, 1]."""
    exponent = (torch.frexp(first).exponent - 1).clamp(-126, 0)
    return torch.ldexp(torch.ones_like(first), exponent)


def _scaled(u: Tensor, scales: Tensor | None, order: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """v, sigma and [s_1, ..., s_r], each (*rows, 1); without normalisation u, and ones of shape (1,)."""
    if scales is None:
        one = u.new_ones(1)
        return u, one, [one] * order
    first, *rest = scales.split(1, dim=-1)
    sigma = _sigma(first)
    return u * sigma, sigma, [first / sigma, *rest]


def _horner(c: list[Tensor], v: Tensor) -> Tensor:
    """sum_i c[i] v^i; every c[i] is (1,) or (*rows, 1)."""
    y = c[-1].expand_as(v)
    for coefficient in reversed(c[:-1]):
        y = torch.addcmul(coefficient, y, v)
    return y


def _ascending(weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """a_1, ..., a_r, each of shape (1,), or (*rows, 1) where every row has its own coefficients."""
    return list(weight.to(dtype).flip(-1).split(1, dim=-1))


class _Polynomial(torch.autograd.Function):
    """y = sum_i a_i t_i + a_0 for every member of the family above.

    weight is (r,) and bias (1,), or (*rows, r) and (*rows, 1): coefficients of each row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        slope: Tensor | None,
        rho: Rho,
        normalize: bool,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        u = _rectify(x, rho, slope)
        order = weight.shape[-1]
        scales = _row_scales(u, order, eps, group) if normalize else None
        v, _, s = _scaled(u, scales, order)
        c = [a * scale for a, scale in zip(_ascending(weight, u.dtype), s, strict=True)]
        y = _horner([bias.to(u.dtype), *c], v)
        ctx.save_for_backward(x, weight, bias, slope, scales)
        ctx.rho, ctx.eps, ctx.group = rho, eps, group
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, slope, scales = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated in its turn

            def formula(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor | None) -> Tensor:
                return _formula(x, weight, bias, slope, ctx.rho, scales is not None, ctx.eps, ctx.group)

            inputs = (x, weight, bias, slope)
            return *differentiable_gradients(ctx, formula, inputs, grad_output), None, None, None, None
        u = _rectify(x, ctx.rho, slope)
        g = grad_output.to(u.dtype)
        order, group = weight.shape[-1], ctx.group
        v, sigma, s = _scaled(u, scales, order)

        # sums over the row: <g, t_1>, ..., <g, t_r>, sum(g); they are all that coefficients and normalisation
        # need
        row_sums, power = [], g
        for scale in s:
            power = power * v
            row_sums.append(power.sum(dim=-1, keepdim=True) * scale)
        dots = torch.cat((*row_sums, g.sum(dim=-1, keepdim=True)), dim=-1)
        if scales is not None:
            all_reduce(dots, group)
        coefficients = dots if weight.dim() > 1 else dots.reshape(-1, order + 1).sum(dim=0)
        if scales is None:
            all_reduce(coefficients, group)

        # sum_i i a_i s_i sigma v^(i-1) (g - t_i <g, t_i> / width), as g P(v) - v Q(v^2)
        a = _ascending(weight, u.dtype)
        p = [i * a[i - 1] * s[i - 1] * sigma for i in range(1, order + 1)]
        grad_u = _horner(p, v) * g
        if scales is not None:
            width = x.shape[-1] * group_size(group)
            q = [p[i] * s[i] * (dots[..., i : i + 1] / width) for i in range(order)]
            grad_u = torch.addcmul(grad_u, _horner(q, v.square()), v, value=-1)

        grad_slope = None
        if ctx.rho is Rho.RELU:
            grad_x = grad_u * (x > 0)
        elif ctx.rho is Rho.PRELU:
            xf = x.to(u.dtype)
            negative = xf <= 0
            grad_slope = all_reduce((grad_u * xf * negative).sum().reshape(1), group).to(slope.dtype)
            grad_x = torch.where(negative, slope.to(u.dtype) * grad_u, grad_u)
        else:
            grad_x = grad_u
        grad_weight = coefficients[..., :order].flip(-1).to(weight.dtype)
        grad_bias = coefficients[..., order:].to(bias.dtype)
        return grad_x.to(x.dtype), grad_weight, grad_bias, grad_slope, None, None, None, None


def _formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    slope: Tensor | None,
    rho: Rho,
    normalize: bool,
    eps: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """What `_Polynomial` computes, in operations that torch differentiates, batches and transforms itself."""
    if group_size(group) > 1:
        raise NotImplementedError(
            "rows that are sharded over a process group have first gradients only, by backward(): neither "
            "torch.func nor gradients of gradients work on them"
        )
    # Not clamp, whose gradient at 0 is 1.
    u = _rectify(x, rho, slope) if rho is not Rho.RELU else x.to(compute_dtype(x.dtype)).relu()
    a = _ascending(weight, u.dtype)
    if not normalize:
        return _horner([bias.to(u.dtype), *a], u).to(x.dtype)
    # Any sigma gives the same t_i = v^i / sqrt(mean(v^2i) + eps sigma^2i); floor makes it a constant.
    sigma = torch.exp2(-u.abs().amax(dim=-1, keepdim=True).clamp_min(1).log2().floor().clamp_max(126))
    v = u * sigma
    y, power, scale = bias.to(u.dtype), torch.ones_like(v), torch.ones_like(sigma)
    for coefficient in a:
        power, scale = power * v, scale * sigma.square()
        rms = (power.square().mean(dim=-1, keepdim=True) + eps * scale).sqrt()
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


def transformed() -> bool:
    """Whether torch.func is at work: grad, vmap, jvp and what is made of them."""
    return torch._C._are_functorch_transforms_active()


def expert_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """Index of each row's set of coefficients: the first whose end, offsets[e], lies beyond the row; the
    number of sets for rows past all ends, which are nobody's.
    """
    row = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, row, right=True)


def polynomial(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    rho: Rho,
    normalize: bool,
    slope: Tensor | None = None,
    eps: float = 1e-6,
    group: dist.ProcessGroup | None = None,
    pre_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    offsets: Tensor | None = None,
    by_formula: bool = False,
) -> Tensor:
    """Apply one member of the family; see the module's docstring, and functional.py for the variants."""
    apply = _formula if by_formula or transformed() else _Polynomial.apply
    if pre_bias is None and row_scale is None and offsets is None:
        return apply(x, weight, bias, slope, rho, normalize, eps, group)
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
    y = apply(u, weight, bias, slope, rho, normalize, eps, group)
    if row_scale is not None:
        y = y * row_scale.unsqueeze(-1)
    if offsets is not None:
        y = torch.where(owned, y, 0)
    return y.to(x.dtype)
