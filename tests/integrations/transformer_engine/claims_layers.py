"""What is claimed of our operations among TE's own: experts, native FP8 recipes, capture in a CUDA graph.

Run in the process that runs claims.py, after it.
"""

from __future__ import annotations

import copy
import inspect
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from polycom_ext.integrations.megatron import torch_cuda
from polycom_ext.ops.polynomial import fused
from tests.integrations.transformer_engine import standin
from tests.integrations.transformer_engine.claims import (
    FUSED,
    Float8Quantizer,
    Unquantised,
    assert_same,
    feed_forward,
    gradients,
    leaf,
    operation,
    recipes,
    te,
)
from tests.integrations.transformer_engine.claims import seed as seed

SPLITS = [5, 0, 9, 2]
NATIVE = hasattr(Float8Quantizer, "inner_tensor_specs")
"""Whether a quantizer says what it allocates; before, C++ knew it."""
STOOD_IN = "POLYCOM_TE_SOURCES" in os.environ
if not torch.cuda.is_available():  # on which TE makes what it keeps itself
    torch_cuda.install()
    standin.name_a_device()
RECIPES = {"delayed": "DelayedScaling", "blocks": "Float8BlockScaling", "MXFP8": "MXFP8BlockScaling"}


@pytest.mark.parametrize("biases", ["none", "plain", "weighted"])
@pytest.mark.parametrize("name", [*FUSED, "swish"])
def test_experts_with_router_weights_are_each_expert_by_itself(name: str, biases: str) -> None:
    """The last layer's biases may be weighted too."""
    hidden, width = 32, 64
    make, options = te.ops.GroupedLinear, {"bias": biases != "none", "device": "cpu", "dtype": torch.float32}
    weighted = {"scale_bias": True} if biases == "weighted" else {}
    if weighted and "scale_bias" not in inspect.signature(make).parameters:
        pytest.skip("this Transformer Engine weights no biases")
    first = make(len(SPLITS), hidden, width, **options)
    last = make(len(SPLITS), width, hidden, **options, **weighted)
    act = operation(name, scaled=True)
    block = te.ops.Sequential(first, act, last)
    for parameter in (*first.parameters(), *last.parameters()):
        torch.nn.init.normal_(parameter, std=0.25)
    x, weights, splits = leaf(sum(SPLITS), hidden), leaf(sum(SPLITS)), torch.tensor(SPLITS)
    y = block(x, splits, weights, splits, *([weights] if weighted else []))
    rows = []
    for i, (of_x, of_weights) in enumerate(zip(x.split(SPLITS), weights.split(SPLITS), strict=True)):
        factors = of_weights.unsqueeze(-1)
        of_first, of_last = (getattr(one, f"bias{i}", None) for one in (first, last))
        wide = torch.nn.functional.linear(of_x, getattr(first, f"weight{i}"), of_first)
        narrow = (act.module(wide) * factors) @ getattr(last, f"weight{i}").T
        if of_last is not None:
            narrow = narrow + (of_last * factors if weighted else of_last)
        rows.append(narrow)
    assert_same(gradients(block, y, x, weights), gradients(block, torch.cat(rows), x, weights), within=3e-6)


@pytest.mark.skipif(not STOOD_IN, reason="TE's own quantisers need a GPU")
@pytest.mark.skipif(not NATIVE, reason="it allocates in C++ only")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_in_fp8_each_expert_s_rows_are_quantised_by_its_own_quantizer_only(recipe: str, scaled: bool) -> None:
    """And not by the first expert's before. TE's quantizer in plain torch has no grouped products."""
    made = getattr(recipes, RECIPES[recipe])()
    sizes, counts = ((128, 256), (256, 128)), [128, 0, 256]
    options: dict[str, Any] = {"bias": False, "device": "cpu", "dtype": torch.bfloat16}
    grouped = [te.ops.GroupedLinear(len(counts), *size, **options) for size in sizes]
    single = [[te.ops.Linear(*size, **options) for _ in counts] for size in sizes]
    act = operation("polynorm", scaled=scaled)
    block, alone = te.ops.Sequential(grouped[0], act, grouped[1]), te.ops.Sequential(act)
    with torch.no_grad():
        for many, ones in zip(grouped, single, strict=True):
            for i, one in enumerate(ones):
                one.weight.copy_(getattr(many, f"weight{i}"))
    x, splits = leaf(sum(counts), 128, dtype=torch.bfloat16), torch.tensor(counts)
    with torch.no_grad():
        x[counts[0] :] *= 8  # of other scales than the first expert's
    weights = [leaf(sum(counts))] if scaled else []
    grad = torch.randn(sum(counts), 128, dtype=torch.bfloat16)
    where = [i for i, count in enumerate(counts) if count]

    def together() -> Tensor:
        out: Tensor = block(x, splits, *weights, splits)
        return out

    def apart() -> Tensor:
        parts = [[one.split(counts)[i] for one in (x, *weights)] for i in where]
        wide = [alone(single[0][i](rows), *rest) for i, (rows, *rest) in zip(where, parts, strict=True)]
        return torch.cat([single[1][i](rows) for i, rows in zip(where, wide, strict=True)])

    def step(run: Any, layers: list[Tensor]) -> list[Tensor]:
        with te.autocast(enabled=True, recipe=made):
            y = run()
        return [y.detach(), *torch.autograd.grad(y, [*act.parameters(), x, *weights, *layers], grad)]

    of_grouped = [getattr(many, f"weight{i}") for many in grouped for i in where]
    of_single = [ones[i].weight for ones in single for i in where]
    for _ in range(2):  # delayed scaling's scales are of the step before
        found, expected = step(together, of_grouped), step(apart, of_single)
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            if i in (1, 2):  # the coefficients' gradients are sums, in another order
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(one, other)


@pytest.mark.skipif(not STOOD_IN, reason="TE's own quantisers need a GPU")
@pytest.mark.skipif(not NATIVE, reason="it allocates in C++ only")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["polynorm", "polyrelu"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_native_recipes_get_their_bytes_of_the_activation_s_kernel(
    recipe: str, name: str, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it can make all that is asked for: not blocks and MXFP8 by columns, which training asks for."""
    size = 128
    act = operation(name)
    first, last = (te.ops.Linear(size, size, bias=False, device="cpu", dtype=torch.bfloat16) for _ in "12")
    last.weight.requires_grad_(not frozen)
    x = leaf(size, size, dtype=torch.bfloat16)
    formed: list[Tensor] = []
    forward = fused.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        formed.append(args[0].x)
        return forward(*args, **kwargs)

    monkeypatch.setattr(fused, "forward", watched)

    def run(between: Any) -> dict[str, Tensor]:
        block = te.ops.Sequential(copy.deepcopy(first), between, copy.deepcopy(last))  # some remember scales
        with te.autocast(enabled=True, recipe=getattr(recipes, RECIPES[recipe])()):
            y = block(x)
        named = [x, block[0].weight, *between.parameters()]
        found = torch.autograd.grad(y, named, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
        return {"y": y.detach(), **{str(i): one for i, one in enumerate(found)}}

    found = run(act)
    assert (not formed) is (recipe == "delayed" or frozen)
    assert_same(found, run(Unquantised(act.module)))


class Captured(TorchDispatchMode):
    """Refuses what ends the capture of a CUDA graph: to read a number, or to copy to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"), name
        assert kwargs.get("device") in (None, torch.device("cpu")) or "_copy" not in name, name
        found = func(*args, **kwargs)
        first = found[0] if isinstance(found, tuple | list) and found else found
        self.made.append((name, tuple(first.shape) if isinstance(first, Tensor) else ()))
        return found


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", [*FUSED, "swish"])
def test_nothing_ends_the_capture_of_a_cuda_graph(
    name: str, bias: bool, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither pass waits for a number, and what is launched and allocated does not depend on the data."""

    def forbidden(self: Tensor, *args: Any) -> Any:
        raise AssertionError("a number was read")

    for way in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, way, forbidden)
    act = operation(name, scaled=scaled)
    model = feed_forward(act, bias)
    made = []
    for x in (torch.randn(16, 32), torch.full((16, 32), torch.nan)):
        inputs = (x.requires_grad_(), *([torch.ones(16).requires_grad_()] if scaled else []))
        y = model(*inputs)  # what is made once, as the fuser's list, is made before the capture
        with Captured() as captured:
            y = model(*inputs)
            torch.autograd.grad(y, (*inputs, *model.parameters()), torch.ones_like(y))
        made.append(captured.made)
    assert any("polycom" in one or "swish" in name for one, _ in made[0])
    assert made[0] == made[1]
