"""Rows of nobody's, a small eps, the range of the reference, and what a NaN or infinity leaves behind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polycom_ext import functional, reference
from polycom_ext.ops.polynomial import library

from .oracle import FUNCTIONS, TOLERANCE, coefficients, error, gradient, leaves

every_function = pytest.mark.parametrize("name", FUNCTIONS)
NORMALIZED = ["poly_norm", "poly_relu_norm"]


@every_function
def test_rows_past_the_last_offset_are_nobodys(path: str, name: str) -> None:
    function, _ = FUNCTIONS[name]
    weight, bias = torch.full((2, 3), 1 / 3), torch.ones(2, 1)
    offsets = torch.tensor([2, 4])
    x, grad = torch.randn(6, 16), torch.randn(6, 16)
    pre_bias, row_scale = torch.randn(2, 16), torch.rand(6)
    owned = leaves(x[:4], weight, bias, pre_bias, row_scale[:4])
    expected = function(*owned[:3], pre_bias=owned[3], row_scale=owned[4], offsets=offsets)
    expected.backward(grad[:4])
    for rubbish in (3.0, torch.inf, torch.nan):
        x[4:], grad[4:], row_scale[4:] = rubbish, rubbish, rubbish
        inputs = leaves(x, weight, bias, pre_bias, row_scale)
        y = function(*inputs[:3], pre_bias=inputs[3], row_scale=inputs[4], offsets=offsets)
        y.backward(grad)
        torch.testing.assert_close(y[:4], expected)
        for actual, wanted in zip(inputs, owned, strict=True):
            torch.testing.assert_close(gradient(actual)[: len(wanted)], gradient(wanted))
            assert not gradient(actual)[len(wanted) :].any()
        assert not y[4:].any()


@every_function
def test_a_shared_bias_before_knows_no_rows_of_nobodys(path: str, name: str) -> None:
    x = torch.randn(3, 16)
    x[2] = torch.nan
    pre_bias = torch.randn(16, requires_grad=True)
    offsets = torch.tensor([2])
    weight, bias = coefficients(3)
    y = FUNCTIONS[name][0](x, weight[None], bias[None], pre_bias=pre_bias, offsets=offsets)
    y.backward(torch.ones_like(y))
    assert gradient(pre_bias).isfinite().all()


@pytest.mark.parametrize("eps", [0.0, -1.0, 1e-40, torch.nan, torch.inf])
def test_an_eps_that_float32_cannot_work_with_is_named(eps: float) -> None:
    x, (weight, bias) = torch.randn(2, 8), coefficients(3)
    for function in (functional.poly_norm, functional.poly_relu_norm):
        with pytest.raises(ValueError, match="eps must be at least 1e-30"):
            function(x, weight, bias, eps)
    with pytest.raises(ValueError, match="eps must be at least 1e-30"):
        functional.poly_norm_linear(x, weight, bias, torch.randn(4, 8), eps=eps)


@pytest.mark.parametrize("name", NORMALIZED)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("eps", [1e-30, 1e-12])
def test_the_smallest_eps_works_at_every_magnitude(path: str, name: str, order: int, eps: float) -> None:
    torch.manual_seed(order)
    function, definition = FUNCTIONS[name]
    weight, bias = coefficients(order)
    for exponent in range(-44, 38, 3):
        inputs = leaves(torch.randn(3, 64) * 10.0**exponent, weight, bias)
        y = function(*inputs, eps=eps)
        assert error(y, definition(*inputs, eps=eps)) <= TOLERANCE[torch.float32]
        y.sum().backward()
        assert all(gradient(tensor).isfinite().all() for tensor in inputs)


@pytest.mark.parametrize("magnitude", [1.7e38, 3.4e38])
def test_the_reference_holds_the_whole_range_of_float32(path: str, magnitude: float) -> None:
    x = torch.full((2, 300), magnitude)
    one = torch.tensor([1.0, 0.0, 0.0, 0.0])  # x^4 / rms(x^4)
    expected = reference.poly_norm(x, one, torch.zeros(1))
    torch.testing.assert_close(expected, torch.ones_like(expected))
    assert error(functional.poly_norm(x, one, torch.zeros(1)), expected) <= TOLERANCE[torch.float32]


def test_the_reference_is_the_formula() -> None:
    x, (weight, bias) = torch.randn(5, 33).double(), coefficients(4)
    powers = [x**i for i in range(4, 0, -1)]
    terms = [power / (power.square().mean(-1, keepdim=True) + 1e-6).sqrt() for power in powers]
    expected = sum(a.double() * term for a, term in zip(weight, terms, strict=True)) + bias
    torch.testing.assert_close(reference.poly_norm(x, weight, bias), expected, rtol=1e-13, atol=1e-13)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, list[Tensor], dict[str, Tensor]]:
    """A function's name, (x, weight, bias), and variants, of any type, order and width."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    name, dtype = draw(st.sampled_from(sorted(FUNCTIONS))), draw(st.sampled_from(sorted(TOLERANCE, key=str)))
    order, rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 70))
    experts: tuple[int, ...] = ()
    variants: dict[str, Tensor] = {}
    if draw(st.booleans()):
        first = draw(st.integers(0, rows))
        variants["offsets"] = torch.tensor([first, rows])
        experts = (2,)
    if draw(st.booleans()):
        variants["pre_bias"] = torch.randn(*(experts if draw(st.booleans()) else ()), width)
    if draw(st.booleans()):
        variants["row_scale"] = torch.rand(rows) + 0.1
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.randn(*experts, order), torch.randn(*experts, 1)
    return name, [torch.randn(rows, width).to(dtype), weight.to(parameters), bias.to(parameters)], variants


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_not_finite_shows(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In y where it was in x; in the coefficients' gradients where it was in y's."""
    if not fused:
        monkeypatch.setattr(library, "devices", frozenset())
        monkeypatch.setattr(library, "problem", "")

    @settings(max_examples=150, deadline=None)
    @given(calls(), st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.data())
    def check(call: tuple[str, list[Tensor], dict[str, Tensor]], value: float, data: st.DataObject) -> None:
        name, (x, weight, bias), variants = call
        function = FUNCTIONS[name][0]
        row = data.draw(st.integers(0, x.shape[0] - 1))
        column = data.draw(st.integers(0, x.shape[1] - 1))
        inputs = leaves(x, weight, bias)
        y = function(*inputs, **variants)
        grad = torch.randn_like(y)
        grad[row, column] = value
        y.backward(grad)
        assert not gradient(inputs[2]).isfinite().all()
        if name == "poly_norm":
            assert not gradient(inputs[0])[row].isfinite().all()
        if value == -torch.inf and name != "poly_norm":
            return  # ReLU(-inf) = 0
        x[row, column] = value
        y = function(x, weight, bias, **variants)
        assert not y[row].isfinite().all()
        others = [i for i in range(len(x)) if i != row]
        assert y[others].isfinite().all()

    check()
