"""The modules and the registry: one name, one entry."""

import os
import subprocess
import sys

import pytest
import torch

import polycom_ext
from polycom_ext import reference
from polycom_ext.activations import REGISTRY, build, parse
from polycom_ext.errors import PolycomError


@pytest.mark.parametrize("name", REGISTRY)
def test_every_entry_builds_and_trains(name: str) -> None:
    entry = REGISTRY[name]
    module = build(name)
    x = torch.randn(3, 8, requires_grad=True)
    y = module(x)
    assert y.shape == (3, 4 if entry.gated else 8)
    y.square().sum().backward()
    assert x.grad is not None
    assert bool(list(module.parameters())) is entry.learnable
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_modules_that_take_variants_mean_by_them_what_the_plain_operations_do() -> None:
    fused = {name: module for name in REGISTRY if getattr(module := build(name), "takes_variants", False)}
    assert {"polynorm", "polyrelu"} <= set(fused)
    counts = torch.tensor([2, 0, 3])
    x, pre_bias, row_scale = torch.randn(5, 8), torch.randn(3, 8), torch.rand(5)
    for module in fused.values():
        expected = module(x + pre_bias.repeat_interleave(counts, dim=0)) * row_scale[:, None]
        y = module(x, pre_bias=pre_bias, row_scale=row_scale, offsets=counts.cumsum(0))
        torch.testing.assert_close(y, expected)
        expected.square().sum().backward()
        grads = [parameter.grad for parameter in module.parameters()]
        module.zero_grad()
        y.square().sum().backward()
        torch.testing.assert_close([parameter.grad for parameter in module.parameters()], grads)


@pytest.mark.parametrize("name", REGISTRY)
def test_normalizes_tells_whether_an_element_depends_on_its_row(name: str) -> None:
    module = build(name)
    x = torch.rand(1, 8) + 0.5
    changed = x.clone()
    changed[0, -1] *= 3
    width = 4 if REGISTRY[name].gated else 8
    kept = slice(0, width - 1)
    assert torch.equal(module(x)[:, kept], module(changed)[:, kept]) is not REGISTRY[name].normalizes


def test_parameters_have_the_released_layout() -> None:
    for order in (1, 3, 4):
        module = polycom_ext.PolyNorm(order)
        assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
            "weight": (order,),
            "bias": (1,),
        }
        assert module.weight.tolist() == pytest.approx([1 / order] * order)
        assert module.bias.item() == 0


def test_orders_in_names() -> None:
    assert parse("polynorm") == (REGISTRY["polynorm"], 3)
    assert parse("polyrelu-4") == (REGISTRY["polyrelu"], 4)
    assert parse("gelu") == (REGISTRY["gelu"], None)
    assert build("polyrelu-2").weight.shape == (2,)


@pytest.mark.parametrize(
    "name", ["polynom", "", "polynorm-", "polynorm-0", "gelu-2", "swish-2", "PolyNorm", "polynorm-3-3"]
)
def test_wrong_names_are_refused(name: str) -> None:
    with pytest.raises(PolycomError):
        parse(name)


def test_lemma_1_relu_and_its_square_are_special_cases() -> None:
    """Paper, Lemma 1: with these coefficients PolyReLU is ReLU and ReLU², exactly."""
    x = torch.randn(4, 64)
    module = polycom_ext.PolyReLU()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(module(x), x.relu())
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(module(x), x.relu().square())


def test_lemma_1_a_polynomial_is_two_polyrelus() -> None:
    """Paper, Lemma 1: p(x) = PolyReLU_1(x) + PolyReLU_2(-x), the second with odd powers negated."""
    x = torch.randn(4, 64, dtype=torch.float64)
    a = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)
    signs = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
    bias = torch.tensor([0.5], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    both = polycom_ext.poly_relu(x, a, bias) + polycom_ext.poly_relu(-x, a * signs, zero)
    expected = a[0] * x**3 + a[1] * x**2 + a[2] * x + bias
    torch.testing.assert_close(both, expected, rtol=1e-12, atol=1e-12)


def test_reference_is_the_formula_by_hand() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0]])
    weight, bias = torch.tensor([0.5, -1.0]), torch.tensor([0.25])
    mean_2, mean_4 = (1 + 4 + 9) / 3, (1 + 16 + 81) / 3
    expected = [
        0.5 * v * v / (mean_4 + 1e-6) ** 0.5 - v / (mean_2 + 1e-6) ** 0.5 + 0.25 for v in (1.0, -2.0, 3.0)
    ]
    assert reference.poly_norm(x, weight, bias)[0].tolist() == pytest.approx(expected, rel=1e-12)
    assert reference.poly_relu(x, weight, bias)[0].tolist() == pytest.approx(
        [0.5 - 1 + 0.25, 0.25, 4.5 - 3 + 0.25]
    )


def _seconds(statement: str, times: int = 3) -> float:
    """Processor time, the best of some fresh processes."""
    best = float("inf")
    for _ in range(times):
        start = os.times()
        subprocess.run([sys.executable, "-c", statement], check=True)
        end = os.times()
        used = end.children_user + end.children_system - start.children_user - start.children_system
        best = min(best, used)
    return best


@pytest.mark.full
def test_import_costs_little_more_than_torch() -> None:
    _seconds("from polycom_ext import PolyNorm", times=1)  # page in
    assert _seconds("from polycom_ext import PolyNorm") < _seconds("import torch") + 0.2


def test_the_registry_is_readable_without_torch() -> None:
    code = """
import sys
import polycom_ext
from polycom_ext.activations import names, parse
assert parse("polynorm-4")[1] == 4 and parse("xielu")[0].learnable and names()
assert "torch" not in sys.modules
from polycom_ext import *
assert PolyNorm().weight.shape == (3,) and polycom_ext.functional.poly_norm is poly_norm
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_brings_nothing_heavier_than_torch() -> None:
    heavy = "megatron transformers transformer_engine matplotlib pyarrow tokenizers yaml olmo"
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; from polycom_ext import *; print(*set({heavy.split()}) & set(sys.modules))",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == ""


@pytest.mark.parametrize("name", REGISTRY)
def test_an_entry_says_what_its_module_learns_and_keeps(name: str) -> None:
    """Beside the module itself, so that a run can be planned without torch."""
    entry, order = parse(name)
    module = build(name, width=8, hidden=8)
    assert entry.parameters(order) == sum(parameter.numel() for parameter in module.parameters())
    assert entry.takes_variants is getattr(module, "takes_variants", False)
    kept: list[torch.Tensor] = []
    x = torch.randn(4, 8, requires_grad=True) * 1  # not a leaf, as FC1's output

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(x)
    wide = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel() == x.numel()}
    of_rows = [tensor.shape[1] for tensor in kept if tensor.shape[0] == 4 and tensor.numel() < x.numel()]
    if not entry.gated:
        assert len(wide - {y.untyped_storage().data_ptr()}) == entry.keeps
        assert sum(of_rows) == entry.row_sums(order)
