"""A ReLU model of Megatron's becomes a PolyReLU model of the same function, and trains on in Megatron."""

from __future__ import annotations

from pathlib import Path

import pytest

from polycom_ext import cli

from .conftest import Trainer
from .test_conversion import MODELS, options, trained

STEPS = 4
STRICTNESS = ["--dist-ckpt-strictness", "assume_ok_unexpected"]
"""Upstream's default."""
STARTS = {"relu": "polyrelu", "relu2, experts": "polyrelu, experts"}


@pytest.fixture(autouse=True)
def experts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, activation in (("relu2, experts", ["--squared-relu"]), ("polyrelu, experts", None)):
        chosen = activation or ["--polycom-activation", "polyrelu"]
        monkeypatch.setitem(MODELS, name, [*MODELS["experts"][:-2], *chosen])


@pytest.mark.full
@pytest.mark.parametrize("old", STARTS)
def test_the_loss_is_the_same_and_goes_down_from_there(train: Trainer, old: str, tmp_path: Path) -> None:
    checkpoint = trained(train, old, tmp_path / "old")
    asked = ["--to", "megatron", "--activation", "polyrelu"]
    assert cli.main(["convert", str(checkpoint), str(tmp_path / "new"), *asked]) == 0
    before, after = (
        train.exactly(*options(model), "--load", str(folder), *STRICTNESS, *more, iterations=STEPS).series(
            "train/loss"
        )
        for model, folder, more in (
            (old, checkpoint.parent, ["--finetune"]),
            (STARTS[old], tmp_path / "new", []),
        )
    )
    assert after[1] == pytest.approx(before[1], abs=1e-6)
    assert after[STEPS] < after[1] - 1e-3
