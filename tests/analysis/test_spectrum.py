"""The effective rank of weights whose spectrum is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polycom_ext.analysis.spectrum import effective_rank


def with_spectrum(values: list[float], rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T


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


def test_a_stack_is_taken_one_by_one_and_half_precision_is_widened() -> None:
    weight = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    one_by_one = torch.stack([effective_rank(part.float()) for part in weight])
    torch.testing.assert_close(effective_rank(weight), one_by_one)
