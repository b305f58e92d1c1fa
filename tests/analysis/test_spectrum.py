"""The effective rank of weights whose spectrum is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polycom_ext.analysis.spectrum import effective_rank


def with_spectrum(values: list[float], rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_it_is_exp_of_the_entropy_of_the_singular_values(values: list[float]) -> None:
    shares = [value / sum(values) for value in values]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert float(effective_rank(with_spectrum(values, 12, 9))) == pytest.approx(expected, rel=1e-9)


def test_it_is_the_rank_where_all_are_equal_and_none_of_nothing() -> None:
    assert float(effective_rank(3 * torch.eye(7))) == pytest.approx(7)
    assert float(effective_rank(torch.ones(4, 9))) == pytest.approx(1)
    assert float(effective_rank(torch.zeros(4, 9))) == 0


def test_a_random_square_has_what_the_quarter_circle_law_gives() -> None:
    """The singular values of n × n normal numbers, over √n, are spread as a quarter of a circle."""
    x = torch.linspace(0, 2, 200_001, dtype=torch.float64)[1:]
    density = (4 - x * x).clamp(min=0).sqrt() / math.pi
    step = float(x[1] - x[0])
    mean = float((density * x).sum() * step)
    entropy = float((density * torch.special.entr(x / mean)).sum() * step)  # of shares times n
    weight = torch.randn(600, 600, generator=torch.Generator().manual_seed(0))
    assert float(effective_rank(weight)) / 600 == pytest.approx(math.exp(entropy), rel=0.01)


@pytest.mark.parametrize("columns", [800, 1600])
def test_a_random_weight_has_what_the_law_of_marchenko_and_pastur_gives(columns: int) -> None:
    """Of r x c normal numbers over sqrt(c): density sqrt((b - s^2)(s^2 - a)) / (pi y s), y = r / c."""
    rows, y = 400, 400 / columns
    low, high = (1 - y**0.5) ** 2, (1 + y**0.5) ** 2
    s = torch.linspace(low**0.5, high**0.5, 200_001, dtype=torch.float64)
    density = ((high - s * s) * (s * s - low)).clamp(min=0).sqrt() / (math.pi * y * s)
    step = float(s[1] - s[0])
    assert float(density.sum() * step) == pytest.approx(1, abs=1e-4)
    mean = float((density * s).sum() * step)
    entropy = float((density * torch.special.entr(s / mean)).sum() * step)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    assert float(effective_rank(weight)) / rows == pytest.approx(math.exp(entropy), rel=0.005)


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1e20, 1e38])
def test_a_factor_changes_nothing(scale: float) -> None:
    weight = torch.randn(12, 9, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    weight[0, 0] = 2.0
    expected = float(effective_rank((weight * scale).double() / scale))
    assert float(effective_rank(weight * scale)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_makes_its_own_weights_rank_none(value: float) -> None:
    weight = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    one = float(effective_rank(weight[0]))
    weight[1, 2, 3] = value
    found = effective_rank(weight).tolist()
    assert math.isnan(found[1])
    assert found[0] == pytest.approx(one)
    assert math.isfinite(found[2])


def test_a_stack_is_taken_one_by_one_and_half_precision_is_widened() -> None:
    weight = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    one_by_one = torch.stack([effective_rank(part.float()) for part in weight])
    torch.testing.assert_close(effective_rank(weight), one_by_one)
