"""The one place that chooses between the fused operations, the compiled formula and plain operations.

Fused: CPU and CUDA where compiled, float16, bfloat16 and float32, order 1 to 4, every rho but PReLU, outside
of torch.func. A GPU that these do not serve takes the same formula by torch.compile instead, unless the call
is itself being compiled. The rest is plain. `POLYCOM_OPS=eager` in the environment, read at import, makes
everything plain.
"""

from __future__ import annotations

import warnings
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor

from polycom_ext.ops.calls import transformed
from polycom_ext.ops.polynomial import compiled, eager, fused, library
from polycom_ext.ops.polynomial.inputs import Inputs, Rho

MAX_FUSED_ORDER = 4
FUSED_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
COMPILED_DEVICES = frozenset({"cuda"})

_said: set[str] = set()


class Path(Enum):
    """What runs a call."""

    FUSED = "the fused operations"
    COMPILED = "the formula by torch.compile"
    PLAIN = "plain torch operations"


def _say_once(device: str, path: Path, problem: str) -> None:
    """One warning a process and device, also when the call is being compiled."""
    if device not in _said:
        _said.add(device)
        warnings.warn(
            f"PolyCom runs {path.value} on {device}, which is slower: {problem}", RuntimeWarning, stacklevel=2
        )


# what torch.compiler.assume_constant_result sets, without its import of torch._dynamo, which takes a second
_say_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(device: torch.device, dtype: torch.dtype, order: int, rho: int) -> Path:
    """What runs a call; warns, once a device, if the fused operations are only missing."""
    fusable = dtype in FUSED_DTYPES and order <= MAX_FUSED_ORDER and rho != Rho.PRELU
    if not fusable or device.type not in ("cpu", "cuda") or transformed():
        return Path.PLAIN
    name, problem = device.type, library.problem
    if device.type in library.devices:
        name, problem = str(device), library.gpu_problem(device.index) if device.type == "cuda" else ""
        if not problem:
            return Path.FUSED
    if not problem:  # plain operations are what was asked for
        return Path.PLAIN
    path = Path.COMPILED if device.type in COMPILED_DEVICES else Path.PLAIN
    _say_once(name, path, problem)
    return Path.PLAIN if torch.compiler.is_compiling() else path


def path_of(inputs: Inputs) -> Path:
    """`choose` for a call."""
    return choose(inputs.x.device, inputs.x.dtype, inputs.weight.shape[-1], inputs.rho)


def polynomial(inputs: Inputs, slope: Tensor | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """One member of the family, with its variants; arguments as in functional.py, already checked."""
    path = path_of(inputs)
    if path is Path.FUSED:
        return fused.polynomial(inputs, group)
    return (compiled if path is Path.COMPILED else eager).polynomial(inputs, slope, group)


def polynomial_linear(inputs: Inputs, linear_weight: Tensor, linear_bias: Tensor | None = None) -> Tensor:
    """A linear layer of `polynomial`; fused if it computes in x's type, else one after the other."""
    linear_type, device = linear_weight.dtype, inputs.x.device.type
    if torch.is_autocast_enabled(device):
        linear_type = torch.get_autocast_dtype(device)
    if linear_type == inputs.x.dtype and path_of(inputs) is Path.FUSED:
        bias = None if linear_bias is None else linear_bias.to(linear_type)
        return fused.polynomial_linear(inputs, linear_weight.to(linear_type), bias)
    return torch.nn.functional.linear(polynomial(inputs), linear_weight, linear_bias)
