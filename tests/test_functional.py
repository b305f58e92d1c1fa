"""The public functions against their float64 definitions: values, gradients, and the edges of every type."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polycom_ext import PolyNorm, functional, reference
from polycom_ext.ops.polynomial.inputs import Inputs

from .oracle import FUNCTIONS, TOLERANCE, coefficients, error, gradient, leaves, saved_tensors

GPU = ["cuda"] if torch.cuda.is_available() else []
every_function = pytest.mark.parametrize("name", FUNCTIONS)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


fused_only = pytest.mark.parametrize("path", ["cpu", *GPU], indirect=True)


@every_dtype
@every_function
@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("width", [2, 7, 16, 37, 64, 1536, 8256])
def test_values_and_gradients(path: str, name: str, dtype: torch.dtype, order: int, width: int) -> None:
    torch.manual_seed(order * width)
    function, definition = FUNCTIONS[name]
    x, grad = torch.randn(5, width).to(dtype), torch.randn(5, width).to(dtype)
    inputs = leaves(x, *coefficients(order, dtype))
    y = function(*inputs)
    y.backward(grad)
    exact = leaves(*(tensor.double() for tensor in inputs))
    expected = definition(*exact)
    expected.backward(grad.double())
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert error(y, expected) <= TOLERANCE[dtype]
    # A gradient may be a small difference of large terms, above all where rows are short.
    slack = 20 if width < 64 else 2
    assert error(gradient(inputs[0]), gradient(exact[0])) <= slack * TOLERANCE[dtype]
    for actual, wanted in zip(inputs[1:], exact[1:], strict=True):
        assert error(gradient(actual), gradient(wanted)) <= 1e-5


@every_function
def test_non_contiguous_and_higher_dimensional_inputs(path: str, name: str) -> None:
    function, definition = FUNCTIONS[name]
    weight, bias = coefficients(3)
    base = torch.randn(6, 4, 40)
    for x in (base.transpose(0, 1), base[:, ::2, 3:33], base[0, 0], base.permute(2, 0, 1), base[..., :1]):
        assert error(function(x, weight, bias), definition(x, weight, bias)) <= TOLERANCE[torch.float32]
    x = base.transpose(0, 1).clone(memory_format=torch.preserve_format).requires_grad_()
    function(x, weight, bias).sum().backward()  # the gradient of a sum is an expanded scalar
    exact = x.detach().double().requires_grad_()
    definition(exact, weight, bias).sum().backward()
    assert error(gradient(x), gradient(exact)) <= 5e-6


@every_function
def test_no_rows(path: str, name: str) -> None:
    inputs = leaves(torch.empty(0, 24), *coefficients(3))
    FUNCTIONS[name][0](*inputs).sum().backward()
    assert gradient(inputs[0]).shape == (0, 24)
    assert not gradient(inputs[1]).any()
    assert not gradient(inputs[2]).any()


@pytest.mark.parametrize("name", ["poly_norm", "poly_relu_norm"])
@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [
        (torch.float16, 1000.0),
        (torch.float16, 60000.0),
        (torch.float16, 1e-7),
        (torch.bfloat16, 1e18),
        (torch.bfloat16, 1e-39),
        (torch.float32, 1e18),
        (torch.float32, 1e36),
        (torch.float32, 1e-40),
    ],
    ids=str,
)
def test_extreme_magnitudes(path: str, name: str, dtype: torch.dtype, magnitude: float, order: int) -> None:
    """No power overflows whose normalised result is finite; denormals are as good as zero."""
    function, definition = FUNCTIONS[name]
    x = ((torch.rand(4, 96) * 2 - 1) * magnitude).to(dtype)
    x[1] = 0
    x[2] = 1
    x[2, 5] = min(magnitude, 6e4 if dtype == torch.float16 else 1e36)
    inputs = leaves(x, *coefficients(order))
    y = function(*inputs)
    expected = definition(x, *inputs[1:])
    assert error(y, expected) <= TOLERANCE[dtype]
    y.sum().backward()
    assert all(gradient(tensor).isfinite().all() for tensor in inputs)


def test_coefficient_gradients_over_65536_rows(path: str) -> None:
    x, grad = torch.randn(65536, 8), torch.randn(65536, 8)
    inputs = leaves(x, *coefficients(3))
    x, weight, bias = inputs
    functional.poly_norm(x, weight, bias).backward(grad)
    exact = leaves(*(tensor.double() for tensor in inputs))
    reference.poly_norm(exact[0], exact[1], exact[2]).backward(grad.double())
    for actual, wanted in zip(inputs[1:], exact[1:], strict=True):
        assert error(gradient(actual), gradient(wanted)) <= 1e-5


def test_results_are_bitwise_repeatable(path: str) -> None:
    x, grad = torch.randn(300, 129), torch.randn(300, 129)
    weight, bias = coefficients(3)
    runs = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        inputs = leaves(x, weight, bias)
        functional.poly_norm(inputs[0], inputs[1], inputs[2]).backward(grad)
        runs.append([tensor.grad for tensor in inputs])
        torch.set_num_threads(before)
    if path != "eager":
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_lemma_1_relu_squared_relu_and_polynomials_are_special_cases() -> None:
    x = torch.randn(4, 33, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)

    def descending(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    assert torch.equal(functional.poly_relu(x, descending(0, 0, 1), zero), x.relu())
    assert torch.equal(functional.poly_relu(x, descending(0, 1, 0), zero), x.relu().square())
    # On x >= 0, which the lemma's shift by a constant reaches on every bounded domain, any polynomial.
    shifted = x - x.min()
    weight, bias = descending(0.5, -2.0, 3.0), descending(0.25)
    polynomial = 0.5 * shifted**3 - 2 * shifted**2 + 3 * shifted + 0.25
    torch.testing.assert_close(functional.poly_relu(shifted, weight, bias), polynomial)


@every_function
def test_gradcheck(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, dtype=torch.float64)
    x = torch.where(x.abs() < 0.05, 0.1, x)  # away from the kink
    inputs = leaves(x, *coefficients(3, torch.float64))
    assert torch.autograd.gradcheck(FUNCTIONS[name][0], inputs)


def test_poly_prelu() -> None:
    x, (weight, bias) = torch.randn(4, 9, dtype=torch.float64), coefficients(3, torch.float64)
    inputs = leaves(x, weight, bias, torch.tensor([0.25], dtype=torch.float64))
    assert error(functional.poly_prelu(*inputs), reference.poly_prelu(*inputs)) <= 1e-12
    assert torch.autograd.gradcheck(functional.poly_prelu, inputs)


@every_function
def test_variants_are_what_they_say(path: str, name: str) -> None:
    torch.manual_seed(1)
    function, definition = FUNCTIONS[name]
    x, weight, bias = torch.randn(11, 40), torch.randn(4, 3), torch.randn(4, 1)
    pre_bias, row_scale = torch.randn(4, 40), torch.rand(11)
    offsets = torch.tensor([3, 3, 7, 11])  # an expert without rows
    inputs = leaves(x, weight, bias, pre_bias, row_scale)
    y = function(*inputs[:3], pre_bias=inputs[3], row_scale=inputs[4], offsets=offsets)
    exact = leaves(*(tensor.double() for tensor in inputs))
    expert = [0, 0, 0, 2, 2, 2, 2, 3, 3, 3, 3]
    rows = [
        definition(exact[0][i] + exact[3][e], exact[1][e], exact[2][e]) * exact[4][i]
        for i, e in enumerate(expert)
    ]
    expected = torch.stack(rows)
    assert error(y, expected) <= TOLERANCE[torch.float32]
    grad = torch.randn(11, 40)
    y.backward(grad)
    expected.backward(grad.double())
    for actual, wanted in zip(inputs, exact, strict=True):
        assert error(gradient(actual), gradient(wanted)) <= 1e-5


@every_function
def test_parameters_in_another_type_have_gradients_of_that_type(path: str, name: str) -> None:
    tensors = (torch.randn(4, 8), torch.randn(2, 3), torch.randn(2, 1), torch.randn(2, 8), torch.rand(4))
    inputs = leaves(*(tensor.bfloat16() for tensor in tensors))
    exact = leaves(*(tensor.double() for tensor in inputs))
    for x, weight, bias, pre_bias, row_scale in (inputs, exact):
        variants = {"pre_bias": pre_bias, "row_scale": row_scale, "offsets": torch.tensor([1, 4])}
        FUNCTIONS[name][0](x, weight, bias, **variants).sum().backward()
    for actual, wanted in zip(inputs, exact, strict=True):
        assert gradient(actual).dtype == torch.bfloat16
        assert error(gradient(actual), gradient(wanted)) <= 2e-2


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(FUNCTIONS)),
    st.sampled_from(sorted(TOLERANCE, key=str)),
    st.integers(1, 6),
    st.lists(st.integers(0, 5), max_size=2),
    st.integers(1, 70),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_shape_stride_type_and_order(
    name: str, dtype: torch.dtype, order: int, lead: list[int], width: int, strided: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    function, definition = FUNCTIONS[name]
    x = torch.randn(*lead, 2 * width).to(dtype)
    x = x[..., ::2] if strided else x[..., width:]
    weight, bias = coefficients(order, dtype)
    y = function(x, weight, bias)
    expected = definition(x, weight, bias)
    # Terms may cancel: the error is one of the terms, not of their sum.
    scale = expected.norm() + float(weight.abs().sum() + bias.abs()) * x.numel() ** 0.5
    assert y.shape == x.shape
    assert float((y.double() - expected).norm()) <= TOLERANCE[dtype] * max(float(scale), 1e-30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(2, 2)}, r"weight must have shape \(r,\)"),
        ({"bias": torch.zeros(2)}, r"bias must have shape \(1,\)"),
        ({"x": torch.zeros(3, 0)}, "at least 1"),
        ({"weight": torch.zeros(3, device="meta")}, "weight is on meta but x is on cpu"),
        ({"pre_bias": torch.zeros(5)}, "pre_bias must have shape"),
        ({"row_scale": torch.zeros(4)}, "row_scale must have shape"),
        ({"offsets": torch.tensor([1.0])}, "offsets must be"),
        ({"offsets": torch.tensor([3])}, r"weight must have shape \(E, r\)"),
    ],
)
def test_mistakes_are_named(change: dict[str, Tensor], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(3, 4),
        "weight": torch.zeros(3),
        "bias": torch.zeros(1),
    } | change
    with pytest.raises(ValueError, match=message):
        functional.poly_norm(**arguments)


@fused_only
@pytest.mark.parametrize("variants", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_opcheck(path: str, normalize: bool, variants: bool) -> None:
    ops, check = torch.ops.polycom, torch.library.opcheck
    x, weight, bias = leaves(torch.randn(5, 24), *coefficients(3))
    inputs = Inputs(x, weight, bias, rho=1, normalize=normalize)
    if variants:
        weight, bias, pre_bias, row_scale = leaves(*(torch.randn(*s) for s in ((2, 3), (2, 1), (24,), (5,))))
        inputs = Inputs(x, weight, bias, pre_bias, row_scale, torch.tensor([2, 5]).int(), *inputs.options)
    check(ops.polynomial.default, inputs)
    inputs = Inputs.of([t if t is None else t.detach() for t in inputs.tensors], inputs.options)
    grad_y, scales = x.detach().sin(), ops.polynomial(*inputs)[1]
    check(ops.polynomial_backward.default, (*inputs, grad_y, scales, True))
    if normalize:
        check(ops.polynomial_sums.default, inputs)
        check(ops.polynomial_from_sums.default, (*inputs, ops.polynomial_sums(*inputs), 24))
        check(ops.polynomial_backward_sums.default, (*inputs, grad_y, scales))
        dots = ops.polynomial_backward_sums(*inputs, grad_y, scales)
        check(ops.polynomial_backward_from_sums.default, (*inputs, grad_y, scales, dots, 24))


LINEAR = {
    "poly_relu": (functional.poly_relu, functional.poly_relu_linear),
    "poly_norm": (functional.poly_norm, functional.poly_norm_linear),
}
then_linear = pytest.mark.parametrize("name", LINEAR)


def linear_inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, bias, linear_weight, linear_bias, pre_bias, row_scale."""
    tensors = (torch.randn(4, 3, 64), torch.randn(10, 64), torch.randn(10))
    x, *linear = (tensor.to(dtype) for tensor in tensors)
    return leaves(x, *coefficients(3), *linear, torch.randn(64), torch.rand(4, 3))


@then_linear
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_layer_behind_is_what_it_says(path: str, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    activation, both = LINEAR[name]
    inputs = linear_inputs(dtype)
    x, weight, bias, linear_weight, linear_bias, pre_bias, row_scale = inputs
    y = both(x, weight, bias, linear_weight, linear_bias, pre_bias=pre_bias, row_scale=row_scale)
    apart = leaves(*inputs)
    hidden = activation(*apart[:3], pre_bias=apart[5], row_scale=apart[6])
    expected = torch.nn.functional.linear(hidden, apart[3], apart[4])
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    for actual, wanted in zip(inputs, apart, strict=True):
        assert error(gradient(actual), gradient(wanted)) <= (1e-2 if dtype == torch.bfloat16 else 1e-6)


@fused_only
@then_linear
def test_a_linear_layer_behind_keeps_no_result(path: str, name: str) -> None:
    x, weight, bias, linear_weight, *_ = linear_inputs()
    with saved_tensors() as kept:
        LINEAR[name][1](x, weight, bias, linear_weight)
    large = [t for t in kept if t.numel() >= x.numel() and t is not linear_weight]
    assert [t.untyped_storage().data_ptr() for t in large] == [x.untyped_storage().data_ptr()]
    with saved_tensors() as kept:
        torch.nn.functional.linear(LINEAR[name][0](x, weight, bias), linear_weight)
    assert sum(t.numel() == x.numel() for t in kept) == 2  # what is saved: x and the result


@then_linear
def test_a_linear_layer_behind_under_autocast_or_frozen(path: str, name: str) -> None:
    x, weight, bias, linear_weight, linear_bias, *_ = linear_inputs()
    activation, both = LINEAR[name]
    for x_now in (x, x.bfloat16()):
        with torch.autocast(x.device.type, torch.bfloat16):
            y = both(x_now, weight, bias, linear_weight, linear_bias)
            expected = torch.nn.functional.linear(activation(x_now, weight, bias), linear_weight, linear_bias)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected)
    y.sum().backward()
    assert gradient(linear_weight).dtype == torch.float32
    frozen = both(x, weight, bias, linear_weight.detach())
    assert torch.autograd.grad(frozen.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"linear_weight": torch.zeros(8, 5)},
            r"linear_weight must have shape \(features, 4\), got \(8, 5\)",
        ),
        ({"linear_bias": torch.zeros(5)}, r"linear_bias must have shape \(8,\), got \(5,\)"),
        ({"linear_weight": torch.zeros(8, 4, device="meta")}, "linear_weight is on meta but x is on cpu"),
    ],
)
def test_mistakes_in_the_linear_layer_are_named(change: dict[str, Tensor], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(3, 4), "weight": torch.zeros(3), "bias": torch.zeros(1)}
    arguments |= {"linear_weight": torch.zeros(8, 4)} | change
    with pytest.raises(ValueError, match=message):
        functional.poly_norm_linear(**arguments)


@fused_only
def test_a_call_is_one_node_of_the_graph(path: str) -> None:
    """A cast of the coefficients, or another shape, as a node of its own would take as long as a few rows."""
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(3).bfloat16(), torch.randn(1).bfloat16()
    inputs = leaves(x, weight, bias, torch.randn(8), torch.rand(2, 3))
    x, weight, bias = inputs[:3]
    y = functional.poly_norm(x, weight, bias, pre_bias=inputs[3], row_scale=inputs[4])
    assert y.grad_fn is not None
    before = [node.name() for node, _ in y.grad_fn.next_functions if node is not None]
    assert before == ["torch::autograd::AccumulateGrad"] * 5
    y.sum().backward()
    assert all((gradient(t).shape, gradient(t).dtype) == (t.shape, t.dtype) for t in inputs)


@fused_only
def test_compiles_in_one_graph(path: str) -> None:
    def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.poly_norm(x * 2, weight, bias).sin()

    inputs = leaves(torch.randn(5, 24), *coefficients(3))
    expected = leaves(*inputs)
    compiled: Callable[..., Tensor] = torch.compile(block, fullgraph=True, backend="aot_eager")
    compiled(*inputs).sum().backward()
    block(*expected).sum().backward()
    for actual, wanted in zip(inputs, expected, strict=True):
        torch.testing.assert_close(actual.grad, wanted.grad)


@fused_only
def test_a_linear_layer_behind_compiles_in_one_graph(path: str) -> None:
    inputs = linear_inputs()[:5]
    expected = leaves(*inputs)
    function: Callable[..., Tensor] = functional.poly_norm_linear
    compiled: Callable[..., Tensor] = torch.compile(function, fullgraph=True, backend="aot_eager")
    compiled(*inputs).sum().backward()
    function(*expected).sum().backward()
    for actual, wanted in zip(inputs, expected, strict=True):
        torch.testing.assert_close(actual.grad, wanted.grad)


def test_checkpointing_and_autocast(path: str) -> None:
    inputs = leaves(torch.randn(5, 24), torch.randn(48, 24), *coefficients(3))
    expected = leaves(*inputs)

    def block(x: Tensor, linear: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            y = functional.poly_norm(x @ linear.T, weight, bias)
        assert y.dtype == torch.bfloat16
        return y

    checkpoint(block, *inputs, use_reentrant=False).sum().backward()
    block(*expected).sum().backward()
    for actual, wanted in zip(inputs, expected, strict=True):
        assert torch.equal(gradient(actual), gradient(wanted))


def test_the_linear_layer_behind_can_be_checkpointed_too(path: str) -> None:
    inputs = linear_inputs()[:5]
    expected = leaves(*inputs)
    function: Callable[..., Tensor] = functional.poly_norm_linear
    checkpoint(function, *inputs, use_reentrant=False).sum().backward()
    function(*expected).sum().backward()
    for actual, wanted in zip(inputs, expected, strict=True):
        assert torch.equal(gradient(actual), gradient(wanted))


@pytest.mark.parametrize("path", GPU, indirect=True)
def test_cuda_graphs(path: str) -> None:
    module = PolyNorm(device="cuda")
    x, grad = torch.randn(64, 1536, device="cuda", requires_grad=True), torch.randn(64, 1536, device="cuda")
    (wanted,) = torch.autograd.grad(module(x), x, grad)
    graphed: Any = torch.cuda.make_graphed_callables(module, (x,))
    (actual,) = torch.autograd.grad(graphed(x), x, grad)
    assert torch.equal(actual, wanted)


@pytest.mark.parametrize(("value", "status"), [("eager", 0), ("quick", 1)])
def test_polycom_ops_in_the_environment(value: str, status: int) -> None:
    code = (
        "from polycom_ext.ops.polynomial import library; assert not library.devices and not library.problem"
    )
    environment = os.environ | {"POLYCOM_OPS": value}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == status
    if status:
        assert "POLYCOM_OPS must be `eager` or unset, got 'quick'" in result.stderr
