"""The arithmetic of the polynomial activations in plain torch operations: a forward and a backward step.

One family covers all four activations: with u = rho(x),

    y = sum_i a_i t_i + a_0,    t_i = u^i            (PolyReLU, PolyPReLU)
                                t_i = u^i / rms(u^i)  (PolyNorm, PolyReLUNorm)

As in csrc/polynomial.h, a row of the normalised ones has a power of two sigma <= 1 near 1 / rms(u), so that
t_i = s_i v^i with v = sigma u and s_i = 1 / rms(v^i): no power of a large u is ever formed, and nothing
overflows whose result is finite. Kept for backward: x, and r numbers a row, 1 / rms(u) and s_2, ..., s_r.
Everything else is recomputed. Arithmetic is float32 (float64 for float64 input), whatever the storage type.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from polycom_ext.ops.calls import all_reduce, compute_dtype, group_size
from polycom_ext.ops.polynomial.inputs import Inputs, Rho


def rectify(x: Tensor, rho: int, slope: Tensor | None) -> Tensor:
    x = x.to(compute_dtype(x.dtype))
    if rho == Rho.RELU:
        return x.clamp(min=0)
    if rho == Rho.PRELU:
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


def horner(c: list[Tensor], v: Tensor) -> Tensor:
    """sum_i c[i] v^i; every c[i] is (1,) or (*rows, 1)."""
    y = c[-1].expand_as(v)
    for coefficient in reversed(c[:-1]):
        y = torch.addcmul(coefficient, y, v)
    return y


def ascending(weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """a_1, ..., a_r, each of shape (1,), or (*rows, 1) where every row has its own coefficients."""
    return list(weight.to(dtype).flip(-1).split(1, dim=-1))


def forward(
    inputs: Inputs, slope: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """y, and the r numbers a row that backward needs.

    weight is (r,) and bias (1,), or (*rows, r) and (*rows, 1): coefficients of each row. No variants.
    """
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    order = weight.shape[-1]
    u = rectify(x, inputs.rho, slope)
    scales = _row_scales(u, order, inputs.eps, group) if inputs.normalize else None
    v, _, s = _scaled(u, scales, order)
    c = [a * scale for a, scale in zip(ascending(weight, u.dtype), s, strict=True)]
    return horner([bias.to(u.dtype), *c], v).to(x.dtype), scales


def backward(
    grad_output: Tensor,
    inputs: Inputs,
    slope: Tensor | None,
    scales: Tensor | None,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of x, weight, bias and slope."""
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    rho, order = inputs.rho, weight.shape[-1]
    u = rectify(x, rho, slope)
    g = grad_output.to(u.dtype)
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
    a = ascending(weight, u.dtype)
    p = [i * a[i - 1] * s[i - 1] * sigma for i in range(1, order + 1)]
    grad_u = horner(p, v) * g
    if scales is not None:
        width = x.shape[-1] * group_size(group)
        q = [p[i] * s[i] * (dots[..., i : i + 1] / width) for i in range(order)]
        grad_u = torch.addcmul(grad_u, horner(q, v.square()), v, value=-1)

    grad_slope = None
    if rho == Rho.RELU:
        grad_x = grad_u * (x > 0)
    elif rho == Rho.PRELU:
        assert slope is not None
        xf = x.to(u.dtype)
        negative = xf <= 0
        grad_slope = all_reduce((grad_u * xf * negative).sum().reshape(1), group).to(slope.dtype)
        grad_x = torch.where(negative, slope.to(u.dtype) * grad_u, grad_u)
    else:
        grad_x = grad_u
    grad_weight = coefficients[..., :order].flip(-1).to(weight.dtype)
    return grad_x.to(x.dtype), grad_weight, coefficients[..., order:].to(bias.dtype), grad_slope
