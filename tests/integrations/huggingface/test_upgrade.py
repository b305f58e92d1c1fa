"""A model becomes one of a larger family of activations, of the same function, and trains on (Lemma 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM

from polycom_ext import cli
from polycom_ext.checkpoints.constants import described

from .conftest import EXPERTS, made, tokens

OTHERS = [
    ("relu", "polyrelu-1"),
    ("relu2", "polyrelu-2"),
    ("polyrelu-2", "polyrelu-4"),
    ("polynorm", "polynorm-5"),
]


def upgrade(source: Path, target: Path, activation: str) -> int:
    return cli.main(["convert", str(source), str(target), "--to", "hf", "--activation", activation])


def trained(model: Any, steps: int) -> list[float]:
    """The loss before each step, of one batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(tokens(), labels=tokens(), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("old", "new", "experts"),
    [
        ("relu", "polyrelu", False),
        ("relu2", "polyrelu", True),
        *(pytest.param(old, new, False, marks=pytest.mark.full) for old, new in OTHERS),
    ],
)
def test_the_loss_is_the_same_and_goes_down_from_there(
    old: str, new: str, experts: bool, tmp_path: Path
) -> None:
    model = made("llama", activation=described(old), **(EXPERTS if experts else {})).train()
    trained(model, 3)
    model.save_pretrained(tmp_path / "old")
    assert upgrade(tmp_path / "old", tmp_path / "new", new) == 0
    larger = AutoModelForCausalLM.from_pretrained(tmp_path / "new").train()
    assert larger.config.activation == described(new)
    before = model(tokens(), labels=tokens()).loss.item()
    at_once, *_, last = trained(larger, 5)
    assert at_once == pytest.approx(before, abs=1e-6)
    assert last < at_once - 1e-3
    coefficients = [one for name, one in larger.named_parameters() if "act_fn" in name]
    assert coefficients
    assert all(one.grad.abs().sum() > 0 for one in coefficients)


def test_constants_stay_those_that_it_was_trained_with(tmp_path: Path) -> None:
    made("llama", activation={**described("polynorm"), "eps": 0.5}).save_pretrained(tmp_path / "old")
    assert upgrade(tmp_path / "old", tmp_path / "new", "polynorm-4") == 0
    larger = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert larger.config.activation == {**described("polynorm-4"), "eps": 0.5}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("gelu", "polyrelu", "has gelu, which is no member of polyrelu-3"),
        ("relu", "polynorm", "has relu, which is no member of polynorm-3"),
        ("relu2", "polyrelu-1", "has relu2, which is no member of polyrelu-1"),
        ("polyrelu", "polyrelu-2", "has polyrelu-3, which is no member of polyrelu-2"),
        ("polyrelu", "polyrelu", "has polyrelu-3, which is no member of polyrelu-3"),
        ("polyrelu", "relu", "has polyrelu-3, which is no member of relu"),
        ("relu", "polyrelux", "unknown activation 'polyrelux'"),
        ("relu", "polyrelu-0", "must be at least 1"),
    ],
)
def test_what_would_be_another_function_is_refused(
    old: str, new: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made("llama", activation=described(old)).save_pretrained(tmp_path / "old")
    assert upgrade(tmp_path / "old", tmp_path / "new", new) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == [tmp_path / "old"]
