"""The polynomial composition activations as functions, differentiable in every tensor.

Source: "Polynomial Composition Activations" (ICLR 2025), section 3.1. Type I composes a polynomial with rho,
sum_i a_i rho(x)^i (Eq. 2); type II applies rho to the powers, sum_i a_i rho(x^i) (Eq. 3).

Conventions, those of the authors' released code:

- `weight`, shape (r,), holds the coefficients in *descending* powers: weight[0] multiplies the power r.
  `bias`, shape (1,), is the constant term a_0.
- The normalisation is x^i / rms(x^i) with rms(v) = sqrt(mean(v^2) + eps) over the last dimension. Eq. 3 of
  the paper divides by the L2 norm instead, which is the same up to the constant sqrt(width).
- Powers, sums and gradients are formed in float32 (float64 for float64 input); the result has the type of x.

Three variants save passes over memory where the operations are fused, and mean the same where they are not:

- `pre_bias`, (width,): the function of x + pre_bias, the sum formed in float32.
- `row_scale`, x.shape[:-1]: the result times row_scale[..., None], as a router's probabilities need it.
- `offsets`, (E,) integers: x is (rows, width) and its rows are grouped by expert; expert e owns the rows
  from offsets[e - 1] (or 0) to offsets[e], as in torch's grouped_mm, and has the coefficients weight[e] (r,)
  and bias[e] (1,) and, where it is two-dimensional, pre_bias[e]. Rows past the last offset, the
  padding of a buffer, are nobody's: whatever they hold, they give y = 0 and a zero gradient of x and
  row_scale, and enter no other gradient.

Where the last dimension is sharded over a process group (tensor parallelism), pass `group`: row sums are
reduced over it, so the function is the one of the whole row, and coefficient gradients come out complete on
every rank. The gradient of `row_scale` is the rank's own share, as that of any factor of a sharded tensor.

torch.func (grad, vmap, jvp, jacrev, …) and gradients of gradients work by the plain formula, which is slower
and keeps more memory; not with `group`.

Other activations stand at the end, for comparison: formed in float32 too, with learnable scalars of shape
(1,), whose gradients come out complete on every rank of `group`.
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack

from polycom_ext.ops.elementwise import elementwise
from polycom_ext.ops.polynomial import dispatch
from polycom_ext.ops.polynomial.inputs import Inputs, Rho

MIN_EPS = 1e-30


class Variants(TypedDict, total=False):
    """Optional arguments of every function but `poly_prelu`; see the module's docstring."""

    pre_bias: Tensor | None
    row_scale: Tensor | None
    offsets: Tensor | None


def _checked(inputs: Inputs, slope: Tensor | None = None) -> Inputs:
    x, weight, bias, pre_bias, row_scale, offsets, _, _, eps = inputs
    if not MIN_EPS <= eps < math.inf:
        raise ValueError(
            f"eps must be at least {MIN_EPS}, so that float32 holds 1 / rms of any row, got {eps}"
        )
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    experts: tuple[int, ...] = ()
    if offsets is not None:
        if offsets.dim() != 1 or offsets.numel() == 0 or offsets.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "offsets must be a one-dimensional tensor of int32 or int64 with an entry per expert"
            )
        if x.dim() != 2:
            raise ValueError(f"with offsets, x must have shape (rows, width), got {tuple(x.shape)}")
        experts = (offsets.numel(),)
    coefficients, constant = ("(E, r)", "(E, 1)") if experts else ("(r,)", "(1,)")
    if weight.dim() != 1 + len(experts) or weight.shape[:-1] != experts or weight.shape[-1] == 0:
        raise ValueError(f"weight must have shape {coefficients} with r >= 1, got {tuple(weight.shape)}")
    if bias.shape != (*experts, 1):
        raise ValueError(f"bias must have shape {constant}, got {tuple(bias.shape)}")
    if slope is not None and slope.shape != (1,):
        raise ValueError(f"slope must have shape (1,), got {tuple(slope.shape)}")
    if pre_bias is not None and pre_bias.shape not in (x.shape[-1:], (*experts, x.shape[-1])):
        raise ValueError(f"pre_bias must have shape ({x.shape[-1]},), got {tuple(pre_bias.shape)}")
    if row_scale is not None and row_scale.shape != x.shape[:-1]:
        raise ValueError(f"row_scale must have shape {tuple(x.shape[:-1])}, got {tuple(row_scale.shape)}")
    others = {"weight": weight, "bias": bias, "slope": slope, "pre_bias": pre_bias, "row_scale": row_scale}
    for name, other in {**others, "offsets": offsets}.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device} but x is on {x.device}")
    return inputs


def _check_linear(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    if linear_weight.dim() != 2 or linear_weight.shape[1:] != x.shape[-1:]:
        shape = tuple(linear_weight.shape)
        raise ValueError(f"linear_weight must have shape (features, {x.shape[-1]}), got {shape}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        shape = tuple(linear_bias.shape)
        raise ValueError(f"linear_bias must have shape ({linear_weight.shape[0]},), got {shape}")
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}")


def poly_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    **variants: Unpack[Variants],
) -> Tensor:
    """PolyReLU: y = sum_{i=1..r} weight[r-i] ReLU(x)^i + bias.

    Args:
        x: any shape with a last dimension of at least 1; float16, bfloat16, float32 or float64.
        weight: (r,), descending powers.
        bias: (1,), the constant term.
        group: process group over which the last dimension is sharded; only gradients of the coefficients need
            it.
        variants: pre_bias, row_scale, offsets; see the module's docstring.

    Returns: a tensor of x's shape and type. Raises ValueError for shapes or devices that do not match.
    """
    inputs = Inputs(x, weight, bias, rho=Rho.RELU, normalize=False, **variants)
    return dispatch.polynomial(_checked(inputs), group=group)


def poly_prelu(
    x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """PolyPReLU: PolyReLU with PReLU(x) = x for x > 0, slope * x elsewhere, in place of ReLU; slope: (1,)."""
    inputs = Inputs(x, weight, bias, rho=Rho.PRELU, normalize=False)
    return dispatch.polynomial(_checked(inputs, slope), slope, group)


def poly_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    group: dist.ProcessGroup | None = None,
    **variants: Unpack[Variants],
) -> Tensor:
    """PolyNorm: y = sum_{i=1..r} weight[r-i] x^i / rms(x^i) + bias.

    rms(v) = sqrt(mean(v^2) + eps), the mean being over a row.

    Args:
        x: any shape; the last dimension is the row (its shard, with `group`). float16, bfloat16, float32 or
            float64.
        weight: (r,), descending powers.
        bias: (1,), the constant term.
        eps: added to the mean of squares; at least 1e-30.
        group: process group over which the row is sharded in equal parts.
        variants: pre_bias, row_scale, offsets; see the module's docstring.

    Returns: a tensor of x's shape and type. Raises ValueError for shapes or devices that do not match.
    """
    return dispatch.polynomial(_checked(Inputs(x, weight, bias, eps=eps, **variants)), group=group)


def poly_relu_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    group: dist.ProcessGroup | None = None,
    **variants: Unpack[Variants],
) -> Tensor:
    """PolyReLUNorm: PolyNorm of ReLU(x), y = sum_i weight[r-i] ReLU(x)^i / rms(ReLU(x)^i) + bias.

    The paper names it in figure 5b without a formula; this is the reading that combines the two as they
    stand.
    """
    inputs = Inputs(x, weight, bias, rho=Rho.RELU, eps=eps, **variants)
    return dispatch.polynomial(_checked(inputs), group=group)


def poly_relu_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    *,
    pre_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """linear(poly_relu(x)), as the second half of a feed-forward block; see `poly_norm_linear`."""
    _check_linear(x, linear_weight, linear_bias)
    inputs = Inputs(x, weight, bias, pre_bias, row_scale, rho=Rho.RELU, normalize=False)
    return dispatch.polynomial_linear(_checked(inputs), linear_weight, linear_bias)


def poly_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    pre_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """linear(poly_norm(x)), as the second half of a feed-forward block.

    Where the operations are fused, only x and 4 r bytes a row are kept for backward, not poly_norm(x), which
    the gradient of linear_weight needs: backward recomputes it in the pass over x that it makes anyway. That
    saves x.numel() elements of memory a layer.

    Args:
        x, weight, bias, eps, pre_bias, row_scale: as for `poly_norm`; rows are whole, not sharded.
        linear_weight: (features, x.shape[-1]).
        linear_bias: (features,).

    Returns: `(*x.shape[:-1], features)`, as torch.nn.functional.linear does, also under autocast. Raises
    ValueError for shapes or devices that do not match.
    """
    _check_linear(x, linear_weight, linear_bias)
    inputs = Inputs(x, weight, bias, pre_bias, row_scale, eps=eps)
    return dispatch.polynomial_linear(_checked(inputs), linear_weight, linear_bias)


def mish(x: Tensor) -> Tensor:
    """Mish: y = x tanh(softplus(x)), softplus(x) = log(1 + e^x).

    Source: Misra, "Mish: A Self Regularized Non-Monotonic Activation Function" (BMVC 2020), Eq. 1.
    """
    return torch.nn.functional.mish(x)


def hardswish(x: Tensor) -> Tensor:
    """HardSwish: y = x min(max(x + 3, 0), 6) / 6.

    Source: Howard et al., "Searching for MobileNetV3" (ICCV 2019), section 5.2.
    """
    # Not torch's own, which overflows where it multiplies before it divides by 6.
    return elementwise(lambda u: u * ((u + 3).clamp(0, 6) / 6), x)


def prelu(x: Tensor, slope: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """PReLU with one slope for all channels: y = x for x > 0 and slope * x elsewhere; slope: (1,).

    Source: He et al., "Delving Deep into Rectifiers" (ICCV 2015), Eq. 1, channel-shared.
    """
    return elementwise(lambda u, slope: torch.where(u > 0, u, slope * u), x, slope, group=group)


def swish(x: Tensor, beta: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Swish-beta: y = x sigmoid(beta x); beta: (1,).

    Source: Ramachandran et al., "Searching for Activation Functions" (2017), section 4.
    """
    return elementwise(lambda u, beta: u * torch.sigmoid(beta * u), x, beta, group=group)


def xielu(
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    beta: float = 0.5,
    eps: float = -1e-6,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """xIELU: a square for x > 0, an exponential elsewhere.

    y = softplus(alpha_p) x^2 + beta x for x > 0, and elsewhere
    (beta + softplus(alpha_n)) (e^min(x, eps) - 1 - x) + beta x; alpha_p, alpha_n: (1,).

    Source: Huang and Schlag, "Deriving Activation Functions Using Integration" (2024, arXiv 2411.13010);
    Apertus's parameters and constants.
    """

    def formula(u: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
        softplus = torch.nn.functional.softplus
        # Each branch on its own half only: what overflows in the other one would be NaN in the gradients.
        positive = softplus(alpha_p) * u.relu() * u.relu()  # not of the square, which may overflow
        negative = (beta + softplus(alpha_n)) * (torch.expm1(u.clamp(max=eps)) - u.clamp(max=0))
        return torch.where(u > 0, positive, negative) + beta * u

    return elementwise(formula, x, alpha_p, alpha_n, group=group)
