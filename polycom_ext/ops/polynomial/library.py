"""Loads the compiled operations, and gives them fake (shape) and autograd implementations.

`devices` names the device types whose operations are loaded; `problem` says in a sentence why some are not.
A library built from other sources than those beside it is refused: its operations may differ.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polycom_ext.errors import PolycomError
from polycom_ext.ops import build
from polycom_ext.ops.polynomial import eager
from polycom_ext.ops.polynomial.eager import expert_of_rows
from polycom_ext.ops.polynomial.steps import Rho

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
        return frozenset(), f"no compiled operations are installed{_noted(library)}; {_REBUILD}"
    try:
        torch.ops.load_library(str(library))
        built_from = torch.ops.polycom.polynomial_build().split()[0]
    except (OSError, RuntimeError, AttributeError) as error:
        return frozenset(), f"{library.name} cannot be loaded ({str(error).splitlines()[0]}); {_REBUILD}"
    if built_from != build.sources_digest(_HERE / "csrc"):
        return frozenset(), f"{library.name} was built from other sources than those in csrc; {_REBUILD}"
    _register()
    problem = _load_cuda(directory / "_cuda.so")
    return frozenset({"cpu"} if problem else {"cpu", "cuda"}), problem


def _load_cuda(library: Path) -> str:
    if torch.version.cuda is None or not library.exists():
        return f"the CUDA operations are not compiled{_noted(library)}; with nvcc at hand {_REBUILD}"
    try:
        torch.ops.load_library(str(library))
        built_from = torch.ops.polycom.polynomial_cuda_build()
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{library.name} cannot be loaded ({str(error).splitlines()[0]}); {_REBUILD}"
    if built_from != build.sources_digest(_HERE / "csrc"):
        return f"{library.name} was built from other sources than those in csrc; {_REBUILD}"
    return ""


def _noted(library: Path) -> str:
    """What the build noted of its failure, in brackets."""
    note = build.failure_note(library)
    if not note.exists():
        return ""
    return f" ({note.read_text().splitlines()[0]}; all of it in {note})"


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
    register_fake = torch.library.register_fake
    register_fake("polycom::polynomial", _fake_forward)
    register_fake("polycom::polynomial_backward", _fake_backward)
    register_fake("polycom::polynomial_sums", _fake_power_sums)
    register_fake("polycom::polynomial_from_sums", _fake_apply)
    register_fake("polycom::polynomial_backward_sums", _fake_row_dots)
    register_fake("polycom::polynomial_backward_from_sums", lambda grad_y, x, *rest: torch.empty_like(x))
    torch.library.register_autograd("polycom::polynomial", backward, setup_context=setup_context)
    for name in ("backward", "sums", "from_sums", "backward_sums", "backward_from_sums"):
        torch.library.register_autograd(f"polycom::polynomial_{name}", _not_differentiable)


def _floats(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor, pre_bias: Any, row_scale: Any, offsets: Any, rho: int,
    normalize: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x), _floats(x, x.shape[0] if normalize else 0, weight.shape[-1])


def _fake_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scales: Tensor, pre_bias: Any, row_scale: Any,
    offsets: Any, rho: int, normalize: bool, recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    coefficients = _floats(x, bias.numel(), weight.shape[-1] + 1)
    grad_row_scale = _floats(x, 0 if row_scale is None else x.shape[0])
    return (
        torch.empty_like(x),
        coefficients,
        grad_row_scale,
        x.new_empty((x.shape[0] if recompute else 0, x.shape[1])),
    )


def _fake_power_sums(x: Tensor, pre_bias: Any, offsets: Any, rho: int, order: int) -> Tensor:
    return x.new_empty((x.shape[0], order), dtype=torch.float64)


def _fake_apply(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _floats(x, x.shape[0], weight.shape[-1])


def _fake_row_dots(grad_y: Tensor, x: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    return _floats(x, x.shape[0], scales.shape[-1] + 1)


def below_autograd() -> AbstractContextManager[object]:
    """For operations within an autograd function: theirs, in Python, would take longer than a few rows do."""
    guard = None if torch.compiler.is_compiling() else getattr(torch._C, "_AutoDispatchBelowAutograd", None)
    return nullcontext() if guard is None else guard()  # a private name that a later torch may lack


def rows_and_parameters(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pre_bias: Tensor | None,
    row_scale: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """As the operations take them: (rows, width), and float32 or int32 parameters, all contiguous."""
    return (
        x.reshape(-1, x.shape[-1]).contiguous(),
        weight.float().contiguous(),
        bias.float().contiguous(),
        None if pre_bias is None else pre_bias.float().contiguous(),
        None if row_scale is None else row_scale.float().reshape(-1).contiguous(),
        None if offsets is None else offsets.to(torch.int32).contiguous(),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """As autograd calls it; the second output, the scales, has no gradient."""
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    keep(ctx, inputs, output[1])


def keep(ctx: Any, inputs: Sequence[Any], scales: Tensor, *more: Tensor) -> None:
    """Save what `gradients` needs: x, the parameters, and order floats a row; after these, `more`."""
    x, weight, bias, pre_bias, row_scale, offsets, ctx.rho, ctx.normalize, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias, scales, pre_bias, row_scale, offsets, *more)


def gradients(ctx: Any, grad_y: Tensor, recompute: bool) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """The gradient of every input of polycom::polynomial, and y if it is to be recomputed."""
    x, weight, bias, scales, pre_bias, row_scale, offsets = ctx.saved_tensors[:7]
    rows, *coefficients, bias_before, scale, ends = rows_and_parameters(
        x, weight, bias, pre_bias, row_scale, offsets
    )
    grad_y = grad_y.reshape(-1, x.shape[-1]).contiguous()
    with below_autograd():
        grad_x, sums, grad_row_scale, y = torch.ops.polycom.polynomial_backward(
            grad_y, rows, *coefficients, scales, bias_before, scale, ends, ctx.rho, ctx.normalize, recompute
        )
    grad_weight, grad_bias = split_coefficients(sums, weight, bias)
    grad_pre_bias = pre_bias_gradient(grad_x, pre_bias, offsets) if ctx.needs_input_grad[3] else None
    grad_row_scale = None if row_scale is None else grad_row_scale.view(row_scale.shape)
    gradients = (grad_x.view(x.shape), grad_weight, grad_bias, grad_pre_bias, grad_row_scale)
    return (*gradients, None, None, None, None), y


def backward(ctx: Any, grad_y: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """As autograd calls it."""
    if torch.is_grad_enabled():  # the gradient is to be differentiated in its turn
        return by_formula(ctx, grad_y)
    return gradients(ctx, grad_y, False)[0]


def by_formula(
    ctx: Any, grad_output: Tensor, linear: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor | None, ...]:
    """The gradient of every input, and of a linear layer behind, in a form that can be differentiated."""
    x, weight, bias, _, pre_bias, row_scale, offsets = ctx.saved_tensors[:7]
    behind = linear or ()

    def formula(*inputs: Any) -> Tensor:
        x, weight, bias, pre_bias, row_scale, _, _, _, _, *linear = inputs
        y = eager.polynomial(
            x, weight, bias, rho=Rho(ctx.rho), normalize=ctx.normalize, eps=ctx.eps, pre_bias=pre_bias,
            row_scale=row_scale, offsets=offsets, by_formula=True,
        )  # fmt: skip
        return torch.nn.functional.linear(y, *linear) if linear else y

    inputs = (x, weight, bias, pre_bias, row_scale, None, None, None, None, *behind)
    return eager.differentiable_gradients(ctx, formula, inputs, grad_output)


def _not_differentiable(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("PolyCom's fused operations can be differentiated once only")


def split_coefficients(coefficients: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(experts, order + 1), powers descending, then the constant -> gradients shaped as weight and bias."""
    powers, constant = coefficients.split((weight.shape[-1], 1), dim=1)
    return powers.reshape(weight.shape), constant.reshape(bias.shape)


def pre_bias_gradient(grad_x: Tensor, pre_bias: Tensor, offsets: Tensor | None) -> Tensor:
    """The sum of grad_x over the rows that a bias was added to, in float32."""
    if pre_bias.dim() == 1:
        return grad_x.sum(dim=0, dtype=torch.float32)
    assert offsets is not None
    expert = expert_of_rows(offsets, grad_x.shape[0])
    sums = grad_x.new_zeros((offsets.numel() + 1, pre_bias.shape[1]), dtype=torch.float32)
    return sums.index_add_(0, expert, grad_x.float())[:-1]  # the last of rows that are nobody's


devices, problem = _load(_HERE)
