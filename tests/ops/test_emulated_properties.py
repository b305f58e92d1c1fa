"""The CUDA kernels, emulated, against float64 at any width, alignment, offsets, type, order and variant."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polycom_ext import reference

from ..oracle import gradient
from .emulated import Emulator

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
Call = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
WIDTHS = (
    st.integers(1, 80)
    | st.sampled_from([1024, 1536, 2048, 2056])  # narrow, and the first that is wide
    | st.sampled_from([8200, 16384, 24576, 32768])  # the widest held: float32's, other types'
    | st.integers(33, 2100).map(lambda pieces: 8 * pieces)
)


def _at(tensor: Tensor, aligned: bool) -> Tensor:
    """The same numbers at an address that is, or is not, a multiple of sixteen bytes."""
    room = torch.empty(tensor.numel() + 16 // tensor.element_size(), dtype=tensor.dtype)
    begin = (-room.data_ptr() % 16) // tensor.element_size() + (0 if aligned else 1)
    view = room[begin : begin + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype, order = draw(st.sampled_from(sorted(TOLERANCE, key=str))), draw(st.integers(1, 4))
    width, rows = draw(WIDTHS), draw(st.integers(1, 9))
    offsets = pre_bias = row_scale = None
    experts: tuple[int, ...] = (1,)
    if draw(st.booleans()):
        ends = sorted(draw(st.lists(st.integers(0, rows), min_size=1, max_size=3)))
        offsets, experts = torch.tensor(ends, dtype=torch.int32), (len(ends),)
    if draw(st.booleans()):
        per_expert = offsets is not None and draw(st.booleans())
        pre_bias = _at(torch.randn(*(experts if per_expert else ()), width), draw(st.booleans()))
    if draw(st.booleans()):
        row_scale = torch.rand(rows) + 0.1
    x, grad = (_at(torch.randn(rows, width).to(dtype), draw(st.booleans())) for _ in range(2))
    return x, grad, torch.randn(*experts, order), torch.randn(*experts, 1), pre_bias, row_scale, offsets


def _close(actual: Tensor, expected: Tensor, scale: Tensor, tolerance: float) -> bool:
    """Terms may cancel: the error is one of the terms, whose size is `scale`."""
    return float((actual.double() - expected).norm()) <= tolerance * float(
        scale.norm() + expected.norm() + 1e-30
    )


@settings(max_examples=60, deadline=None)
@given(calls(), st.sampled_from([(0, True), (1, True), (1, False)]), st.booleans())
def test_any_call_matches_float64(
    emulator: Emulator, call: Call, member: tuple[int, bool], recompute: bool
) -> None:
    x, grad, weight, bias, pre_bias, row_scale, offsets = call
    rho, normalize = member
    variants = (pre_bias, row_scale, offsets, rho, normalize)
    y, scales = emulator.forward(x, weight, bias, *variants, 1e-6)
    grad_x, coefficients, grad_row_scale, again = emulator.backward(
        grad, x, weight, bias, scales, *variants, recompute
    )
    if again is not None:
        assert torch.equal(again, y)
    exact = {
        name: tensor.double().requires_grad_()
        for name, tensor in zip(
            ("x", "weight", "bias", "row_scale"), (x, weight, bias, row_scale), strict=True
        )
        if tensor is not None
    }
    owners = [0] * len(x)
    if offsets is not None:
        owners = torch.searchsorted(offsets, torch.arange(len(x), dtype=torch.int32), right=True).tolist()
    expected = torch.zeros(x.shape, dtype=torch.float64)
    terms = torch.zeros(x.shape, dtype=torch.float64)
    function = reference.poly_norm if normalize else reference.poly_relu
    for row, owner in enumerate(owners):
        if owner == len(weight):
            continue
        u = exact["x"][row]
        if pre_bias is not None:
            u = u + (pre_bias[owner] if pre_bias.dim() == 2 else pre_bias).double()
        u = u.relu() if rho == 1 else u
        value = function(u, exact["weight"][owner], exact["bias"][owner])
        factor = 1.0 if row_scale is None else exact["row_scale"][row]
        expected = expected.index_put((torch.tensor([row]),), value * factor)
        size = function(u.abs(), weight[owner].abs(), bias[owner].abs()) * factor
        terms[row] = size.detach()
    if expected.requires_grad:
        expected.backward(grad.double())
    tolerance = TOLERANCE[x.dtype]
    assert _close(y, expected.detach(), terms, tolerance)
    for name, actual in (("x", grad_x), ("row_scale", grad_row_scale)):
        if actual is not None and exact[name].grad is not None:
            # a gradient may be a small difference of large terms, above all where rows are short
            slack = 100 if x.shape[1] < 64 else 4
            assert _close(actual, gradient(exact[name]), terms * grad.double(), slack * tolerance)
    if exact["weight"].grad is not None:
        wanted = torch.cat((gradient(exact["weight"]), gradient(exact["bias"])), dim=1)
        assert _close(coefficients, wanted, grad.double() * (1 + terms), 1e-5)
