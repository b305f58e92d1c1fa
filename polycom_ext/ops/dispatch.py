"""The one place that chooses between the fused operations and the eager ones.

Fused: CPU and CUDA where compiled, float16, bfloat16 and float32, order 1 to 4, every rho but PReLU, outside
of torch.func. The rest is eager. `POLYCOM_OPS=eager` in the environment, read at import, makes everything
eager.
"""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor

from polycom_ext.ops import eager, fused, library
from polycom_ext.ops.eager import Rho

MAX_FUSED_ORDER = 4
FUSED_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})

_said: set[str] = set()


def _say_once(device: str, problem: str) -> None:
    """One warning a process and device, also when the call is being compiled."""
    if device not in _said and problem:
        _said.add(device)
        warnings.warn(
            f"PolyCom runs plain torch operations on {device}, which is slower: {problem}",
            RuntimeWarning,
            stacklevel=2,
        )


# what torch.compiler.assume_constant_result sets, without its import of torch._dynamo, which takes a second
_say_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_fused(x: Tensor, order: int, rho: Rho) -> bool:
    """Whether a call runs the fused operations; warns, once, if only their absence stands in the way."""
    device = x.device.type
    if (
        x.dtype not in FUSED_DTYPES
        or order > MAX_FUSED_ORDER
        or rho is Rho.PRELU
        or device not in ("cpu", "cuda")
        or eager.transformed()
    ):
        return False
    if device not in library.devices:
        _say_once(device, library.problem)
        return False
    if device == "cuda" and (problem := library.gpu_problem(x.device.index)):
        _say_once(f"cuda:{x.device.index}", problem)
        return False
    return True


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
) -> Tensor:
    """One member of the family, with its variants; arguments as in functional.py, already checked."""
    if is_fused(x, weight.shape[-1], rho):
        return fused.polynomial(
            x, weight, bias, rho=rho, normalize=normalize, eps=eps, group=group, pre_bias=pre_bias,
            row_scale=row_scale, offsets=offsets,
        )  # fmt: skip
    return eager.polynomial(
        x, weight, bias, rho=rho, normalize=normalize, slope=slope, eps=eps, group=group, pre_bias=pre_bias,
        row_scale=row_scale, offsets=offsets,
    )  # fmt: skip


def polynomial_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    *,
    rho: Rho,
    normalize: bool,
    eps: float = 1e-6,
    pre_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """A linear layer of `polynomial`; fused if it computes in x's type, else one after the other."""
    linear_type = linear_weight.dtype
    if torch.is_autocast_enabled(x.device.type):
        linear_type = torch.get_autocast_dtype(x.device.type)
    if linear_type == x.dtype and is_fused(x, weight.shape[-1], rho):
        return fused.polynomial_linear(
            x, weight, bias, linear_weight.to(linear_type),
            None if linear_bias is None else linear_bias.to(linear_type), rho=rho, normalize=normalize,
            eps=eps, pre_bias=pre_bias, row_scale=row_scale,
        )  # fmt: skip
    y = polynomial(
        x, weight, bias, rho=rho, normalize=normalize, eps=eps, pre_bias=pre_bias, row_scale=row_scale
    )
    return torch.nn.functional.linear(y, linear_weight, linear_bias)
