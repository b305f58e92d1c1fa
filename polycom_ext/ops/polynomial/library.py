"""Loads the compiled operations, and gives them fake (shape) implementations.

`devices` names the device types whose operations are loaded; `problem` says in a sentence why some are not.
A library built from other sources than those beside it is refused: its operations may differ.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polycom_ext.errors import PolycomError
from polycom_ext.ops import build
from polycom_ext.ops.polynomial.inputs import Inputs

_HERE = Path(__file__).resolve().parent
_gpu_problems: dict[int, str] = {}
_REBUILD = "build it with `pip install . --no-build-isolation`"


def _load(directory: Path) -> tuple[frozenset[str], str]:
    mode = os.environ.get("POLYCOM_OPS", "")
    if mode == "eager":
        return frozenset(), ""
    if mode:
        raise PolycomError(f"POLYCOM_OPS must be `eager` or unset, got {mode!r}")
    library = directory / "_cpu.so"
    if not library.exists():
        return frozenset(), f"no compiled operations are installed{_noted(library)}; {_way_out()}"
    try:
        torch.ops.load_library(str(library))
        built_from = torch.ops.polycom.polynomial_build().split()[0]
    except (OSError, RuntimeError, AttributeError) as error:
        return frozenset(), f"{library.name} cannot be loaded ({str(error).splitlines()[0]}); {_way_out()}"
    if built_from != build.sources_digest(_HERE / "csrc"):
        return frozenset(), f"{library.name} was built from other sources than those in csrc; {_REBUILD}"
    _register()
    problem = _load_cuda(directory / "_cuda.so")
    return frozenset({"cpu"} if problem else {"cpu", "cuda"}), problem


def _load_cuda(library: Path) -> str:
    if not library.exists():
        return f"the CUDA operations are not compiled{_noted(library)}; with nvcc at hand {_REBUILD}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; {library.name} needs one that has it"
    try:
        torch.ops.load_library(str(library))
        built_from = torch.ops.polycom.polynomial_cuda_build().partition(":")[0]
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{library.name} cannot be loaded ({str(error).splitlines()[0]}); {_REBUILD}"
    if built_from != build.sources_digest(_HERE / "csrc"):
        return f"{library.name} was built from other sources than those in csrc; {_REBUILD}"
    return ""


def _way_out() -> str:
    return build.too_old(torch.__version__) or _REBUILD


def _noted(library: Path) -> str:
    """What the build noted of its failure, in brackets."""
    note = build.failure_note(library)
    if not note.exists():
        return ""
    return f" ({note.read_text().splitlines()[0]}; all of it in {note})"


def instruction_set() -> str | None:
    """What the CPU's operations have chosen (`avx512`, `avx2`, `baseline`); None if they are not loaded."""
    return str(torch.ops.polycom.polynomial_build().split()[1]) if "cpu" in devices else None


def cuda_architectures() -> list[str]:
    """What the CUDA operations hold code for: `sm_90`, and `compute_100` for PTX, which later ones run."""
    return torch.ops.polycom.polynomial_cuda_build().split(":")[1:] if "cuda" in devices else []


def gpu_problem(index: int) -> str:
    """Why the CUDA operations do not run on a GPU (too old a driver, no code for it): a sentence, or nothing.

    The library is asked once a GPU; a call there would raise.
    """
    if index not in _gpu_problems:
        _gpu_problems[index] = str(torch.ops.polycom.polynomial_cuda_problem(index))
    return _gpu_problems[index]


# what torch.compiler.assume_constant_result sets, without its import of torch._dynamo, which takes a second
gpu_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _register() -> None:
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"polycom::{name}")(_of_inputs(fake))
    # the gradient of the first is fused.py's; the second, which fills what it is given, has none
    for name in _FAKES.keys() - {"polynomial", "polynomial_quantized"}:
        torch.library.register_autograd(f"polycom::{name}", _not_differentiable)


def _of_inputs(fake: Callable[..., object]) -> Callable[..., object]:
    """fake(Inputs, more) as a function of a schema's flat arguments."""
    count = len(Inputs._fields)
    return lambda *values: fake(Inputs(*values[:count]), *values[count:])


def _floats(inputs: Inputs, *shape: int) -> Tensor:
    return inputs.x.new_empty(shape, dtype=torch.float32)


def _fake_backward(inputs: Inputs, grad_y: Tensor, scales: Tensor, recompute: bool) -> tuple[Tensor, ...]:
    rows, width = inputs.x.shape
    return (
        torch.empty_like(inputs.x),
        _floats(inputs, inputs.bias.numel(), inputs.order + 1),
        _floats(inputs, 0 if inputs.row_scale is None else rows),
        inputs.x.new_empty((rows if recompute else 0, width)),
    )


def _fake_forward(inputs: Inputs, *_: Any) -> tuple[Tensor, Tensor]:
    rows = inputs.x.shape[0] if inputs.normalize else 0
    return torch.empty_like(inputs.x), _floats(inputs, rows, inputs.order)


_FAKES: dict[str, Callable[..., object]] = {
    "polynomial": _fake_forward,
    "polynomial_backward": _fake_backward,
    "polynomial_quantized": lambda i, *_: _floats(i, i.x.shape[0] if i.normalize else 0, i.order),
    "polynomial_sums": lambda i: i.x.new_empty((i.x.shape[0], i.order), dtype=torch.float64),
    "polynomial_from_sums": _fake_forward,
    "polynomial_backward_sums": lambda i, *_: _floats(i, i.x.shape[0], i.order + 1),
    "polynomial_backward_from_sums": lambda i, *_: torch.empty_like(i.x),
}


def _not_differentiable(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("PolyCom's fused operations can be differentiated once only")


devices, problem = _load(_HERE)
