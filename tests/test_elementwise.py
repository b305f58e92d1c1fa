"""Element-wise activations: their float64 definitions, the edges of types, what is kept, sharded rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from polycom_ext import functional, reference
from polycom_ext.modules import Learnable

from .oracle import TOLERANCE, error, gradient, leaves, saved_tensors

SCALARS = {"mish": [], "hardswish": [], "prelu": [0.25], "swish": [1.3], "xielu": [0.2, -1.1]}
LEARNABLE = [name for name, scalars in SCALARS.items() if scalars]
every_function = pytest.mark.parametrize("name", SCALARS)


def pair(name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return getattr(functional, name), getattr(reference, name)


def scalars(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.tensor([value], dtype=dtype) for value in SCALARS[name]]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@every_function
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    function, definition = pair(name)
    x, grad = 3 * torch.randn(7, 96).to(dtype), torch.rand(7, 96).to(dtype)  # no sum that cancels
    inputs = leaves(x, *scalars(name, torch.float64 if dtype == torch.float64 else torch.float32))
    y = function(*inputs)
    y.backward(grad)
    exact = leaves(*(tensor.double() for tensor in inputs))
    expected = definition(*exact)
    expected.backward(grad.double())
    assert y.dtype == dtype
    assert error(y, expected) <= TOLERANCE[dtype]
    assert error(gradient(inputs[0]), gradient(exact[0])) <= 2 * TOLERANCE[dtype]
    for actual, wanted in zip(inputs[1:], exact[1:], strict=True):
        assert gradient(actual).shape == (1,)
        assert error(gradient(actual), gradient(wanted)) <= 1e-5


@settings(max_examples=150, deadline=None)
@example("xielu", torch.bfloat16, [1.8410714726934774e19])
@given(
    st.sampled_from(sorted(SCALARS)),
    st.sampled_from(sorted(TOLERANCE, key=str)),
    st.lists(st.floats(-1e39, 1e39), min_size=1, max_size=6),
)
def test_finite_numbers_of_any_size(name: str, dtype: torch.dtype, values: list[float]) -> None:
    """No NaN, and no infinity where the true result is finite in x's type; nor in the gradients."""
    function, definition = pair(name)
    largest = torch.finfo(dtype).max
    x = torch.tensor(values, dtype=torch.float64).clamp(-largest, largest).to(dtype)
    inputs = leaves(x, *scalars(name))
    y, expected = function(*inputs), definition(*inputs)
    holds = expected.abs() <= 0.999 * largest
    assert not y.isnan().any()
    assert y[holds].isfinite().all()
    # near zero, and near a zero of the function, an error in proportion to x
    slack = TOLERANCE[dtype] * torch.maximum(expected.abs(), x.double().abs().clamp_max(8)) + 1e-7
    assert ((y.double() - expected).abs() <= 4 * slack)[holds].all()
    y.sum().backward()
    assert not any(gradient(tensor).isnan().any() for tensor in inputs)


@every_function
def test_gradcheck(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 9, dtype=torch.float64) * 2
    x = torch.where((x.abs() < 0.05) | ((x.abs() - 3).abs() < 0.05), 0.1, x)  # away from the kinks
    assert torch.autograd.gradcheck(pair(name)[0], leaves(x, *scalars(name, torch.float64)))


def test_special_cases() -> None:
    x = torch.randn(5, 40)
    one, zero = torch.ones(1), torch.zeros(1)
    torch.testing.assert_close(functional.swish(x, one), torch.nn.functional.silu(x))
    assert torch.equal(functional.swish(x, zero), x / 2)
    assert torch.equal(functional.prelu(x, zero), x.relu())
    assert torch.equal(functional.prelu(x, one), x)
    torch.testing.assert_close(functional.hardswish(x), torch.nn.functional.hardswish(x))


@pytest.mark.parametrize("name", LEARNABLE)
def test_only_x_is_kept_and_hooks_see_a_gradient_once(name: str) -> None:
    x, *parameters = leaves(torch.randn(4, 64).bfloat16(), *scalars(name))
    seen: list[Tensor] = []
    for parameter in parameters:
        parameter.register_hook(seen.append)
    with saved_tensors() as kept:
        y = pair(name)[0](x, *parameters)
    assert [t.data_ptr() for t in kept if t.numel() > 1] == [x.data_ptr()]
    y.sum().backward()
    assert len(seen) == len(parameters)


@pytest.mark.full
@pytest.mark.parametrize("name", LEARNABLE)
def test_compiles_in_one_graph(name: str) -> None:
    inputs = leaves(torch.randn(5, 24), *scalars(name))
    expected = leaves(*inputs)
    compiled = torch.compile(pair(name)[0], fullgraph=True, backend="aot_eager")
    compiled(*inputs).sum().backward()
    pair(name)[0](*expected).sum().backward()
    for actual, wanted in zip(inputs, expected, strict=True):
        torch.testing.assert_close(actual.grad, wanted.grad)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"must have shape \(1,\), got \(8,\)"):
        functional.swish(torch.zeros(3, 8), torch.zeros(8))
    with pytest.raises(TypeError, match="floating-point"):
        functional.prelu(torch.zeros(3, dtype=torch.long), torch.zeros(1))


RANK_PROGRAM = """
import sys
import torch, torch.distributed as dist
from polycom_ext import activations

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
x, grad = torch.randn(7, 64), torch.randn(7, 64)
own = slice(32 * rank, 32 * rank + 32)
for name in sys.argv[3:]:
    whole, shard = activations.build(name), activations.build(name, group=dist.group.WORLD)
    whole(x).backward(grad)
    shard(x[:, own]).backward(grad[:, own])
    for one, other in zip(whole.parameters(), shard.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-5)
try:
    torch.func.grad(lambda x: shard(x).sum())(x[:, own])
except NotImplementedError as error:
    assert "sharded over a process group" in str(error)
else:
    raise AssertionError("sharded rows under torch.func")
dist.destroy_process_group()
"""


def test_gradients_of_scalars_are_complete_where_rows_are_sharded(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK_PROGRAM]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), *LEARNABLE],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)


def test_what_was_learned_is_named_as_on_paper() -> None:
    from polycom_ext.activations import build

    named = {
        name: module.coefficients() for name in LEARNABLE if isinstance(module := build(name), Learnable)
    }
    assert named == {
        "prelu": {"negative slope": 0.25},
        "swish": {"β": 1.0},
        "xielu": {"αₚ": pytest.approx(0.8), "αₙ": pytest.approx(0.8)},
    }
