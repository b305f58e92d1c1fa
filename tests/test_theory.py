"""Lemma 1 and Theorem 1 of the paper, exactly: every number of a 16-bit type, or rational arithmetic.

The constructions are those of the proofs. Sums of products of small dyadic numbers have no rounding in
float64, so that there what our functions give *is* the rational number. The slips of the paper, and what is
tested:

- Eq. 5, x^i = ReLU(x)^i + (-1)^i ReLU(-x)^i, is stated for all i and is wrong for i = 0, where it says 1 = 2.
  It is tested for i >= 1; the constant is, as Eq. 6 has it, in the first PolyReLU alone.
- Section 3 gives PolyNorm the same expressivity as PolyReLU, without a proof. Of the lemma and the theorem,
  which are about PolyReLU, that is not so: PolyNorm is bounded, ReLU is not.
"""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from polycom_ext import functional

Matrix = list[list[Fraction]]
ORDERS = (1, 2, 3, 4)


def power_alone(power: int, order: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The coefficients of the proof: 1 of that power, 0 of the others; in descending order."""
    weight = torch.zeros(order, dtype=dtype)
    weight[order - power] = 1
    return weight


def dyadic(source: random.Random, denominator: int, largest: int = 1) -> Fraction:
    return Fraction(source.randint(-largest * denominator, largest * denominator), denominator)


def rational(values: Tensor) -> list[Fraction]:
    """A float is a rational number: without rounding."""
    return [Fraction(value) for value in values.tolist()]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_lemma_1_relu_and_its_square_are_poly_relus_at_every_number(
    path: str, dtype: torch.dtype, order: int
) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    none = torch.zeros(1)
    assert torch.equal(functional.poly_relu(x, power_alone(1, order), none), x.relu())
    if order > 1:
        assert torch.equal(functional.poly_relu(x, power_alone(2, order), none), x.relu().square())


@pytest.mark.parametrize("order", ORDERS)
def test_lemma_1_a_polynomial_is_the_sum_of_two_poly_relus(path: str, order: int) -> None:
    source = random.Random(order)
    grid = [Fraction(n, 16) for n in range(-128, 129)]
    x = torch.tensor([float(value) for value in grid], dtype=torch.float64)
    for _ in range(20):
        a = [dyadic(source, 8, 4) for _ in range(order + 1)]
        descending = torch.tensor([float(value) for value in reversed(a[1:])], dtype=torch.float64)
        signs = torch.tensor([(-1.0) ** power for power in range(order, 0, -1)], dtype=torch.float64)
        constant, none = torch.tensor([float(a[0])]).double(), torch.zeros(1, dtype=torch.float64)
        first = functional.poly_relu(x, descending, constant)
        second = functional.poly_relu(-x, signs * descending, none)
        expected = [sum((c * value**power for power, c in enumerate(a)), Fraction(0)) for value in grid]
        assert rational(first + second) == expected


def floats(matrix: Matrix) -> Tensor:
    return torch.tensor([[float(value) for value in row] for row in matrix], dtype=torch.float64)


def relu_network(layers: list[tuple[Matrix, list[Fraction]]], x: list[Fraction]) -> list[Fraction]:
    """ReLU between the layers, none behind the last."""
    for index, (weight, bias) in enumerate(layers):
        x = [
            sum((w * value for w, value in zip(row, x, strict=True)), constant)
            for row, constant in zip(weight, bias, strict=True)
        ]
        if index + 1 < len(layers):
            x = [max(value, Fraction(0)) for value in x]
    return x


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("depth", "width"), [(1, 4), (2, 7), (4, 5)])
def test_theorem_1_a_relu_network_is_a_poly_relu_network_of_the_same_size(
    path: str, depth: int, width: int, order: int
) -> None:
    """The same matrices, with the coefficients of Lemma 1 in each layer: no matrix more."""
    source = random.Random(depth * width)
    widths = [3, *[width] * depth, 1]
    layers = [
        (
            [[dyadic(source, 8) for _ in range(fan_in)] for _ in range(fan_out)],
            [dyadic(source, 8) for _ in range(fan_out)],
        )
        for fan_in, fan_out in pairwise(widths)
    ]
    points = [[dyadic(source, 16) for _ in range(3)] for _ in range(40)]
    expected = [relu_network(layers, point)[0] for point in points]
    assert len(set(expected)) > 10  # a network that gives the same everywhere would show nothing
    weight, none = power_alone(1, order, torch.float64), torch.zeros(1, dtype=torch.float64)
    g = floats(points)
    for index, (matrix, bias) in enumerate(layers):
        g = g @ floats(matrix).T + floats([bias])
        if index + 1 < len(layers):
            g = functional.poly_relu(g, weight, none)
    assert rational(g[:, 0]) == expected


@pytest.mark.parametrize("width", [1, 8, 1536])
def test_poly_norm_is_bounded_so_no_lemma_1_holds_of_it(path: str, width: int) -> None:
    """|y| <= |a_0| + sqrt(width) sum |a_i|, which one number alone in its row comes close to."""
    weight, bias = torch.tensor([0.5, 0.25, 2.0]), torch.tensor([0.125])
    bound = float(bias) + width**0.5 * float(weight.sum())
    alone = torch.zeros(3, width)
    alone[:, 0] = torch.tensor([1e3, 1e9, 1e30])
    largest = functional.poly_norm(alone, weight, bias).amax(dim=-1)
    assert largest.tolist() == pytest.approx([bound] * 3, rel=1e-5)
    rows = torch.randn(64, width) * 10 ** torch.linspace(-6, 30, 64)[:, None]
    assert float(functional.poly_norm(rows, weight, bias).abs().amax()) <= bound * (1 + 1e-6)
