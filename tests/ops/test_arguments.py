"""What a direct call of the compiled operations is refused: nothing is read or written beyond a tensor.

A caller of functional.py never gets there. That a tensor is on another device takes two: not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from polycom_ext.ops.polynomial import library
from polycom_ext.ops.polynomial.quantized import MAX_WIDTH, Recipe, scale_shape

pytestmark = pytest.mark.skipif("cpu" not in library.devices, reason=library.problem or "POLYCOM_OPS=eager")

ROWS, WIDTH, ORDER = 6, 64, 3
SCALE, AMAX = torch.ones(1), torch.zeros(1)
THREE = torch.tensor([2, 4, 6], dtype=torch.int32)


class Call(NamedTuple):
    """A right one; in the order of the schemas."""

    x: Tensor
    weight: Tensor = torch.ones(ORDER)
    bias: Tensor = torch.zeros(1)
    pre_bias: Tensor | None = None
    row_scale: Tensor | None = None
    offsets: Tensor | None = None
    rho: int = 0
    normalize: bool = True
    eps: float = 1e-6


class Buffers(NamedTuple):
    """Of the operation that quantizes y."""

    data: Tensor
    scale_inv: Tensor
    scale: Tensor | None = None
    amax: Tensor | None = None
    recipe: int = Recipe.BLOCKS
    power_of_two: bool = True
    epsilon: float = 0.0
    swizzled: bool = False


def _misaligned(dtype: torch.dtype, places: int) -> Tensor:
    """One whose address is a multiple of 16 but for some places."""
    return torch.zeros(ROWS * WIDTH + places, dtype=dtype)[places:].view(ROWS, WIDTH)


def _buffers(recipe: Recipe, width: int = WIDTH) -> Buffers:
    kind = torch.uint8 if recipe == Recipe.MX else torch.float32
    scale_inv = torch.zeros(scale_shape(recipe, ROWS, width), dtype=kind)
    return Buffers(torch.zeros(ROWS, width, dtype=torch.uint8), scale_inv, SCALE, AMAX, recipe)


X = torch.ones(ROWS, WIDTH)
COEFFICIENTS: dict[str, tuple[dict[str, Any], str]] = {
    "x in float64": ({"x": X.double()}, "x must be float32, bfloat16 or float16"),
    "x of one dimension": ({"x": X[0]}, r"x must have shape \(rows, width\)"),
    "no columns": ({"x": X[:, :0]}, r"x must have shape \(rows, width\)"),
    "too many columns": ({"x": torch.empty(0, 2**31)}, "rows are too wide"),
    "columns of a wider x": ({"x": torch.ones(ROWS, 2 * WIDTH)[:, ::2]}, "x must be contiguous"),
    "no order": ({"weight": torch.ones(0)}, "the order must be 1 to 4, got 0"),
    "order 5": ({"weight": torch.ones(5)}, "the order must be 1 to 4, got 5"),
    "another rho": ({"rho": 2}, "this rho is not fused"),
    "neither ReLU nor rows to normalise": ({"normalize": False}, "this rho is not fused"),
    "weight in bfloat16": ({"weight": torch.ones(ORDER).bfloat16()}, "weight has the wrong type"),
    "weight of a wider one": ({"weight": torch.ones(6)[::2]}, "weight must be contiguous"),
    "bias in bfloat16": ({"bias": torch.zeros(1).bfloat16()}, "bias has the wrong type"),
    "no bias": ({"bias": torch.zeros(0)}, "weight and bias do not match"),
    "weights for two and a half": ({"weight": torch.ones(5), "bias": torch.zeros(2)}, "weight and bias"),
    "experts of nobody's rows": (
        *({"weight": torch.ones(3, ORDER), "bias": torch.zeros(3)},),
        "several sets of coefficients need offsets",
    ),
    "offsets in int64": ({"offsets": torch.tensor([6])}, "offsets has the wrong type"),
    "offsets of more experts": ({"offsets": THREE}, "offsets must have 1 elements, got 3"),
    "pre_bias in bfloat16": ({"pre_bias": torch.ones(WIDTH).bfloat16()}, "pre_bias has the wrong type"),
    "pre_bias of another width": (
        {"pre_bias": torch.ones(WIDTH - 1)},
        "pre_bias must have 64 elements, got 63",
    ),
    "pre_bias of more experts": (
        {"pre_bias": torch.ones(2, WIDTH)},
        "pre_bias must have 64 elements, got 128",
    ),
    "pre_bias of one of three experts": (
        {
            "weight": torch.ones(3, ORDER),
            "bias": torch.zeros(3),
            "offsets": THREE,
            "pre_bias": torch.ones(1, WIDTH),
        },
        "pre_bias must have 192 elements, got 64",
    ),
    "row_scale in bfloat16": ({"row_scale": torch.ones(ROWS).bfloat16()}, "row_scale has the wrong type"),
    "row_scale of other rows": ({"row_scale": torch.ones(1)}, "row_scale must have 6 elements, got 1"),
}
"""What all operations have in common -> what is changed, and the sentence."""


@pytest.mark.parametrize(("change", "sentence"), COEFFICIENTS.values(), ids=COEFFICIENTS)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], sentence: str) -> None:
    call = Call(X)
    torch.ops.polycom.polynomial(*call)
    with pytest.raises(RuntimeError, match=f"polycom: .*{sentence}"):
        torch.ops.polycom.polynomial(*call._replace(**change))


G, S, P = torch.ones(ROWS, WIDTH), torch.ones(ROWS, ORDER), torch.ones(ROWS, ORDER).double()
D = torch.ones(ROWS, ORDER + 1)
WRONG_RESULTS: dict[str, tuple[str, tuple[Any, ...], tuple[Any, ...], str]] = {
    # operation: a right call's other arguments, wrong ones, the sentence
    "grad_y's type": ("backward", (G, S, False), (G.half(), S, False), "grad_y has the wrong type"),
    "grad_y's size": ("backward", (G, S, False), (G[:5], S, False), "grad_y must have 384 elements, got 320"),
    "scales' type": ("backward", (G, S, False), (G, P, False), "scales has the wrong type"),
    "scales' size": ("backward", (G, S, False), (G, S[:5], False), "scales must have 18 elements, got 15"),
    "sums' type": ("from_sums", (P, WIDTH), (S, WIDTH), "sums has the wrong type"),
    "sums' size": ("from_sums", (P, WIDTH), (P[:5], WIDTH), "sums must have 18 elements, got 15"),
    "dots' type": (
        "backward_from_sums",
        (G, S, D, WIDTH),
        (G, S, D.double(), WIDTH),
        "dots has the wrong type",
    ),
    "dots' size": (
        "backward_from_sums",
        (G, S, D, WIDTH),
        (G, S, S, WIDTH),
        "dots must have 24 elements, got 18",
    ),
}


@pytest.mark.parametrize(("name", "right", "wrong", "sentence"), WRONG_RESULTS.values(), ids=WRONG_RESULTS)
def test_what_forward_or_another_rank_gave_must_fit(
    name: str, right: tuple[Any, ...], wrong: tuple[Any, ...], sentence: str
) -> None:
    operation = getattr(torch.ops.polycom, f"polynomial_{name}")
    operation(*Call(X), *right)
    with pytest.raises(RuntimeError, match=f"polycom: {sentence}"):
        operation(*Call(X), *wrong)


def test_only_normalised_rows_have_sums() -> None:
    torch.ops.polycom.polynomial_sums(*Call(X, rho=1))
    with pytest.raises(RuntimeError, match="polycom: only normalised rows have sums"):
        torch.ops.polycom.polynomial_sums(*Call(X, rho=1, normalize=False))


def _refusals() -> Iterator[tuple[str, Recipe, dict[str, Any], dict[str, Any], str]]:
    """name, recipe, changes of the call and of the buffers, sentence."""
    x = X.bfloat16()
    kinds = "quantized results are of bfloat16, of order 3, without pre_bias"
    for name, change in {
        "float32": {"x": X},
        "float16": {"x": X.half()},
        "order 2": {"weight": torch.ones(2)},
        "a bias before": {"pre_bias": torch.zeros(WIDTH)},
    }.items():
        yield name, Recipe.BLOCKS, change, {}, kinds
    for width in (60, MAX_WIDTH + 8):
        wide = {"x": torch.ones(ROWS, width).bfloat16()}
        buffers = _buffers(Recipe.BLOCKS, width)._asdict()
        sentence = "the width must be a multiple of 8, at most 32768"
        yield f"width {width}", Recipe.BLOCKS, wide, buffers, sentence
    forty = {"x": torch.ones(ROWS, 40).bfloat16()}
    sentence = "the width must be a multiple of 32"
    yield "width 40", Recipe.MX, forty, _buffers(Recipe.MX, 40)._asdict(), sentence
    for number in (-1, len(Recipe)):
        yield f"recipe {number}", Recipe.BLOCKS, {}, {"recipe": number}, f"there is no recipe {number}"
    for recipe in Recipe:
        right = _buffers(recipe)
        where = f"{recipe.name}, "
        yield where + "data's type", recipe, {}, {"data": right.data.char()}, "data has the wrong type"
        sentence = "data must have 384 elements, got 320"
        yield where + "data's size", recipe, {}, {"data": right.data[:5]}, sentence
        columns = torch.zeros(WIDTH, ROWS, dtype=torch.uint8).T
        yield where + "data's order", recipe, {}, {"data": columns}, "data must be contiguous"
        wrong = right.scale_inv.to(torch.float32 if recipe == Recipe.MX else torch.uint8)
        yield where + "scale_inv's type", recipe, {}, {"scale_inv": wrong}, "scale_inv has the wrong type"
        size = right.scale_inv.numel()
        for other in (right.scale_inv.flatten()[1:], torch.cat([right.scale_inv.flatten()] * 2)):
            sentence = f"scale_inv must have {size} elements, got {other.numel()}"
            yield where + f"scale_inv of {other.numel()}", recipe, {}, {"scale_inv": other.clone()}, sentence
    misaligned = "x or data is misaligned"
    yield "x at 8", Recipe.BLOCKS, {"x": _misaligned(torch.bfloat16, 4)}, {}, misaligned
    yield "data at 4", Recipe.BLOCKS, {}, {"data": _misaligned(torch.uint8, 4)}, misaligned
    for name, one in {"scale": SCALE, "amax": AMAX}.items():
        yield f"no {name}", Recipe.TENSOR, {}, {name: None}, "scale and amax are missing"
        yield f"{name}'s type", Recipe.TENSOR, {}, {name: one.double()}, f"{name} has the wrong type"
        for more in (0, 2):
            sentence = f"{name} must have 1 elements, got {more}"
            yield f"{name} of {more}", Recipe.TENSOR, {}, {name: torch.zeros(more)}, sentence
    assert x.data_ptr() % 16 == 0


REFUSALS = {name: rest for name, *rest in _refusals()}


@pytest.mark.parametrize(("recipe", "call", "buffers", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_of_the_operation_that_quantizes_y_what_does_not_fit_is_refused(
    recipe: Recipe, call: dict[str, Any], buffers: dict[str, Any], sentence: str
) -> None:
    """And nothing is written."""
    right, target = Call(X.bfloat16()), _buffers(recipe)
    torch.ops.polycom.polynomial_quantized(*right, *target)
    wrong = target._replace(**buffers)
    wrong.data.fill_(99)
    with pytest.raises(RuntimeError, match=f"polycom: {sentence}"):
        torch.ops.polycom.polynomial_quantized(*right._replace(**call), *wrong)
    assert bool((wrong.data == 99).all())
