"""Textbook definitions of the polynomial composition activations in float64: the oracle of every test.

Nothing here is fast, fused or differentiated by hand. Formulas: "Polynomial Composition Activations" (ICLR
2025), section 3.1, Eq. 2 and 3, in the layout of the authors' released code: `weight` holds the coefficients
of the powers r, r-1, ..., 1 and `bias` the constant term a_0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _combine(terms: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """sum_i a_i terms[i-1] + a_0, with a_i = weight[r - i]."""
    order = weight.numel()
    result = bias.double().reshape(()).expand(terms[0].shape)
    for power, term in enumerate(terms, start=1):
        result = result + weight[order - power].double() * term
    return result


def _normalized_power(x: Tensor, power: int, eps: float) -> Tensor:
    """x^i / rms(x^i), numerator and denominator divided by m^i, m = max(|x|, 1) of the row.

    x^2i, which the mean of squares takes, leaves even float64's range for the largest float32.
    """
    largest = x.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1)
    scaled = (x / largest) ** power
    eps_scaled = eps / largest**power / largest**power
    return scaled / torch.sqrt(scaled.square().mean(dim=-1, keepdim=True) + eps_scaled)


def poly_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """sum_i a_i ReLU(x)^i + a_0, computed in float64."""
    rectified = x.double().clamp(min=0)
    return _combine([rectified**i for i in range(1, weight.numel() + 1)], weight, bias)


def poly_prelu(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor) -> Tensor:
    """sum_i a_i PReLU(x)^i + a_0 with PReLU(x) = x for x > 0 and slope * x elsewhere, computed in float64."""
    x = x.double()
    rectified = torch.where(x > 0, x, slope.double() * x)
    return _combine([rectified**i for i in range(1, weight.numel() + 1)], weight, bias)


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """sum_i a_i x^i / rms(x^i) + a_0, rms(v) = sqrt(mean(v^2) + eps) over the last dimension; float64."""
    x = x.double()
    return _combine([_normalized_power(x, i, eps) for i in range(1, weight.numel() + 1)], weight, bias)


def poly_relu_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """sum_i a_i ReLU(x)^i / rms(ReLU(x)^i) + a_0, computed in float64."""
    return poly_norm(x.double().clamp(min=0), weight, bias, eps)


def mish(x: Tensor) -> Tensor:
    """x tanh(log(1 + e^x)), computed in float64; log(1 + e^x) as max(x, 0) + log(1 + e^-|x|)."""
    x = x.double()
    return x * torch.tanh(x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())))


def hardswish(x: Tensor) -> Tensor:
    """x min(max(x + 3, 0), 6) / 6, computed in float64."""
    x = x.double()
    return x * (x + 3).clamp(0, 6) / 6


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """x for x > 0 and slope * x elsewhere, computed in float64."""
    x = x.double()
    return torch.where(x > 0, x, slope.double() * x)


def swish(x: Tensor, beta: Tensor) -> Tensor:
    """x / (1 + e^(-beta x)), computed in float64."""
    x = x.double()
    return x * torch.sigmoid(beta.double() * x)


def xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float = 0.5, eps: float = -1e-6) -> Tensor:
    """a_p x^2 + beta x for x > 0, a_n (e^min(x, eps) - 1 - x) + beta x elsewhere; float64.

    a_p = log(1 + e^alpha_p) and a_n = beta + log(1 + e^alpha_n).
    """
    x = x.double()
    a_p = torch.log1p(torch.exp(alpha_p.double()))
    a_n = beta + torch.log1p(torch.exp(alpha_n.double()))
    left, right = x.clamp(max=0), x.clamp(min=0)
    negative = a_n * (torch.expm1(left.clamp(max=eps)) - left)
    return beta * x + torch.where(x > 0, a_p * right**2, negative)
