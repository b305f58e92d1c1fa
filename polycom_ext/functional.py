"""The polynomial composition activations as functions, differentiable in every tensor.

Source: "Polynomial Composition Activations" (ICLR 2025), section 3.1. Type I composes a polynomial with rho,
sum_i a_i rho(x)^i (Eq. 2); type II applies rho to the powers, sum_i a_i rho(x^i) (Eq. 3).

Conventions, those of the authors' released code:

- `weight`, shape (r,), holds the coefficients in *descending* powers: weight[0] multiplies the power r.
  `bias`, shape (1,), is the constant term a_0.
- The normalisation is x^i / rms(x^i) with rms(v) = sqrt(mean(v^2) + eps) over the last dimension. Eq. 3 of
  the paper divides by the L2 norm instead, which is the same up to the constant sqrt(width).
- Powers, sums and gradients are formed in float32 (float64 for float64 input); the result has the type of x.

Where the last dimension is sharded over a process group (tensor parallelism), pass `group`: row sums are
reduced over it, so the function is the one of the whole row, and coefficient gradients come out complete on
every rank.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from polycom_ext.ops import eager
from polycom_ext.ops.eager import Rho


def _check(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor | None = None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    if weight.dim() != 1 or weight.numel() == 0:
        raise ValueError(f"weight must have shape (r,) with r >= 1, got {tuple(weight.shape)}")
    for name, scalar in (("bias", bias), ("slope", slope)):
        if scalar is not None and scalar.shape != (1,):
            raise ValueError(f"{name} must have shape (1,), got {tuple(scalar.shape)}")
    for name, other in (("weight", weight), ("bias", bias), ("slope", slope)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device} but x is on {x.device}")


def poly_relu(x: Tensor, weight: Tensor, bias: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """PolyReLU: y = sum_{i=1..r} weight[r-i] ReLU(x)^i + bias.

    Args:
        x: any shape with a last dimension of at least 1; float16, bfloat16, float32 or float64.
        weight: (r,), descending powers.
        bias: (1,), the constant term.
        group: process group over which the last dimension is sharded; only gradients of the coefficients need
            it.

    Returns: a tensor of x's shape and type. Raises ValueError for shapes or devices that do not match.
    """
    _check(x, weight, bias)
    return eager.polynomial(x, weight, bias, rho=Rho.RELU, normalize=False, group=group)


def poly_prelu(
    x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """PolyPReLU: PolyReLU with PReLU(x) = x for x > 0 and slope * x elsewhere in place of ReLU; slope:
    (1,).
    """
    _check(x, weight, bias, slope)
    return eager.polynomial(x, weight, bias, rho=Rho.PRELU, normalize=False, slope=slope, group=group)


def poly_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """PolyNorm: y = sum_{i=1..r} weight[r-i] x^i / rms(x^i) + bias, rms(v) = sqrt(mean(v^2) + eps) over a
    row.

    Args:
        x: any shape; the last dimension is the row (its shard, with `group`). float16, bfloat16, float32 or
            float64.
        weight: (r,), descending powers.
        bias: (1,), the constant term.
        eps: added to the mean of squares.
        group: process group over which the row is sharded in equal parts.

    Returns: a tensor of x's shape and type. Raises ValueError for shapes or devices that do not match.
    """
    _check(x, weight, bias)
    return eager.polynomial(x, weight, bias, rho=Rho.IDENTITY, normalize=True, eps=eps, group=group)


def poly_relu_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """PolyReLUNorm: PolyNorm of ReLU(x), y = sum_i weight[r-i] ReLU(x)^i / rms(ReLU(x)^i) + bias.

    The paper names it in figure 5b without a formula; this is the reading that combines the two as they
    stand.
    """
    _check(x, weight, bias)
    return eager.polynomial(x, weight, bias, rho=Rho.RELU, normalize=True, eps=eps, group=group)
