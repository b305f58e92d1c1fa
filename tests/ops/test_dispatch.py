"""What runs a call: the fused operations, the formula by torch.compile, or plain operations."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from polycom_ext import functional, reference
from polycom_ext.ops.polynomial import compiled, dispatch, library
from polycom_ext.ops.polynomial.dispatch import Path
from polycom_ext.ops.polynomial.inputs import Inputs, Rho

from ..oracle import FUNCTIONS, TOLERANCE, coefficients, error, gradient, leaves

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: nothing has been said, nothing compiled."""
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setattr(compiled._Compiled, "works", True)
    for step in compiled.COMPILED:
        monkeypatch.delitem(step.__dict__, "_compiled", raising=False)


@pytest.fixture
def unserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for a GPU that has no compiled operations."""
    monkeypatch.setattr(library, "devices", frozenset())
    monkeypatch.setattr(library, "problem", "nothing is compiled for it")
    monkeypatch.setattr(dispatch, "COMPILED_DEVICES", frozenset({"cpu"}))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without its code generation, which takes most of the time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def test_what_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "devices", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(library, "gpu_problem", lambda index: "")
    bfloat16 = torch.bfloat16
    for device in (CPU, torch.device("cuda:0")):
        assert dispatch.choose(device, bfloat16, 4, Rho.RELU) is Path.FUSED
        assert dispatch.choose(device, bfloat16, 5, Rho.RELU) is Path.PLAIN
        assert dispatch.choose(device, bfloat16, 3, Rho.PRELU) is Path.PLAIN
        assert dispatch.choose(device, torch.float64, 3, Rho.RELU) is Path.PLAIN
    assert dispatch.choose(torch.device("meta"), bfloat16, 3, Rho.RELU) is Path.PLAIN
    assert torch.func.vmap(lambda x: x * (dispatch.choose(CPU, bfloat16, 3, Rho.RELU) is Path.PLAIN))(
        torch.ones(2)
    ).all()


def test_a_gpu_that_the_operations_cannot_serve_takes_the_compiled_formula(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two GPUs of which the second is too old."""
    problems = ["", "_cuda.so holds no code for compute capability 7.5"]
    monkeypatch.setattr(library, "devices", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(library, "gpu_problem", problems.__getitem__)
    served, too_old = (
        partial(dispatch.choose, torch.device("cuda", i), torch.half, 3, Rho.RELU) for i in (0, 1)
    )
    assert served() is Path.FUSED
    with pytest.warns(
        RuntimeWarning, match=r"by torch.compile on cuda:1, which is slower: .* capability 7\.5"
    ):
        assert too_old() is Path.COMPILED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert too_old() is Path.COMPILED
        assert torch.func.vmap(lambda x: x * (too_old() is Path.PLAIN))(torch.ones(2)).all()


def test_without_operations_a_gpu_takes_the_compiled_formula_and_a_cpu_the_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "devices", frozenset())
    monkeypatch.setattr(library, "problem", "nothing is compiled")
    with pytest.warns(
        RuntimeWarning, match="plain torch operations on cpu, which is slower: nothing is compiled"
    ):
        assert dispatch.choose(CPU, torch.half, 3, Rho.RELU) is Path.PLAIN
    with pytest.warns(
        RuntimeWarning, match=r"by torch.compile on cuda, which is slower: nothing is compiled"
    ):
        assert dispatch.choose(torch.device("cuda:1"), torch.half, 3, Rho.RELU) is Path.COMPILED
    monkeypatch.setattr(library, "problem", "")  # POLYCOM_OPS=eager
    assert dispatch.choose(torch.device("cuda:1"), torch.half, 3, Rho.RELU) is Path.PLAIN


def _check_gradients(
    name: str, dtype: torch.dtype, rows: tuple[int, ...], width: int, order: int = 3
) -> None:
    function, definition = FUNCTIONS[name]
    inputs = leaves(torch.randn(*rows, width).to(dtype), *coefficients(order))
    y = function(*inputs)
    grad = torch.randn_like(y)
    y.backward(grad)
    exact = leaves(*(tensor.double() for tensor in inputs))
    expected = definition(*exact)
    expected.backward(grad.double())
    assert (y.dtype, y.shape) == (dtype, inputs[0].shape)
    assert error(y, expected) <= TOLERANCE[dtype]
    assert error(gradient(inputs[0]), gradient(exact[0])) <= 2 * TOLERANCE[dtype]
    for actual, wanted in zip(inputs[1:], exact[1:], strict=True):
        assert error(gradient(actual), gradient(wanted)) <= 1e-5


@pytest.mark.parametrize("path", ["eager"], indirect=True)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_plain_operations_are_what_an_older_torch_can_compile(
    path: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.6 to 2.10 trace neither a slice of a named tuple nor a property of one."""

    def untraceable(*_: object) -> None:
        pytest.fail("this breaks the graph")

    for property_ in ("order", "tensors", "options"):
        monkeypatch.setattr(Inputs, property_, property(untraceable))
    monkeypatch.setattr(Inputs, "__getitem__", untraceable)
    monkeypatch.setattr(Inputs, "_make", untraceable)
    x, weight, bias = leaves(torch.randn(4, 8), torch.randn(2, 3), torch.randn(2, 1))
    FUNCTIONS[name][0](x, weight[0], bias[0]).sum().backward()
    variants = {"pre_bias": torch.randn(8), "row_scale": torch.rand(4), "offsets": torch.tensor([1, 4])}
    FUNCTIONS[name][0](x, weight, bias, **variants).sum().backward()


@pytest.mark.filterwarnings("ignore:PolyCom runs")
def test_the_compiled_formula_is_the_function(unserved: None, quick: None) -> None:
    """Compiled once for all numbers of rows.

    In another's torch.compile, and for more than a first gradient, what torch compiles or differentiates
    itself.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    for rows in ((5,), (2, 7), (300,), (2, 3, 2)):
        _check_gradients("poly_norm", torch.bfloat16, rows, 64)
    assert counters["stats"]["unique_graphs"] == 4  # of either step, the first number of rows and any
    assert compiled._Compiled.works

    x, weight, bias = leaves(torch.randn(4, 12), *coefficients(3))
    (first,) = torch.autograd.grad(functional.poly_norm(x, weight, bias).sin().sum(), x, create_graph=True)
    (wanted,) = torch.autograd.grad(reference.poly_norm(x, weight, bias).sin().sum(), x, create_graph=True)
    second, twice = (torch.autograd.grad(one.square().sum(), weight)[0] for one in (first, wanted))
    assert error(second, twice) <= 1e-5

    def block(x: Tensor) -> Tensor:
        path = dispatch.choose(x.device, x.dtype, 3, Rho.IDENTITY)
        return functional.poly_norm(2 * x, weight, bias) * (2 if path is Path.PLAIN else 1)

    (actual,), (wanted,) = (
        torch.autograd.grad(f(x).sum(), x) for f in (torch.compile(block, fullgraph=True), block)
    )
    torch.testing.assert_close(actual, 2 * wanted)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:PolyCom runs")
@pytest.mark.parametrize("name", ["poly_norm", "poly_relu"])  # with and without rows that are reduced
def test_the_generated_code_is_the_function(unserved: None, name: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    for dtype, rows in ((torch.bfloat16, 5), (torch.float32, 5), (torch.float32, 9), (torch.float32, 0)):
        if rows:
            _check_gradients(name, dtype, (rows,), 300, order=4)
        else:
            assert FUNCTIONS[name][0](torch.ones(0, 300), *coefficients(4)).shape == (0, 300)
    assert compiled._Compiled.works
    x, weight, bias = torch.randn(7, 40), torch.randn(2, 3), torch.randn(2, 1)
    more: dict[str, Tensor] = {"pre_bias": torch.randn(40), "row_scale": torch.rand(7)}
    y = FUNCTIONS[name][0](x, weight, bias, offsets=torch.tensor([3, 6]), **more)
    for e, part in ((0, slice(0, 3)), (1, slice(3, 6))):
        whole = FUNCTIONS[name][1](x[part] + more["pre_bias"], weight[e], bias[e])
        assert error(y[part], whole * more["row_scale"][part, None]) <= TOLERANCE[torch.float32]
    assert not y[6].any()


def test_where_torch_compile_does_not_work_plain_operations_serve(
    unserved: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(*_: object) -> None:
        raise RuntimeError("Cannot find a working triton installation\nand more")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _check_gradients("poly_norm", torch.float32, (5,), 64)
        _check_gradients("poly_relu", torch.float32, (6,), 64)
    sentences = [str(warning.message) for warning in said if "PolyCom" in str(warning.message)]
    assert len(sentences) == 2
    assert "runs the formula by torch.compile on cpu, which is slower: nothing is compiled" in sentences[0]
    assert "runs plain torch operations, which is slower still: torch.compile failed" in sentences[1]
    assert "Cannot find a working triton installation)" in sentences[1]
    assert not compiled._Compiled.works


def test_too_little_memory_is_not_a_failure_to_compile(
    unserved: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(torch, "compile", lambda _: step)
    with pytest.warns(RuntimeWarning), pytest.raises(torch.OutOfMemoryError):
        functional.poly_norm(torch.randn(2, 8), *coefficients(3))
    assert compiled._Compiled.works
