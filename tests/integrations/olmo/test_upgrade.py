"""Experts of OLMo's with ReLU² become such with PolyReLU, of the same function, and train on (Lemma 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polycom_ext import cli
from polycom_ext.integrations.olmo.conversion import STEP

from .conftest import Trainer

RESET: dict[str, Any] = {"reset_optimizer_state": True, "reset_trainer_state": True}


@pytest.mark.long
def test_experts_lose_the_same_and_train_on(train: Trainer, tmp_path: Path) -> None:
    first = train(max_duration=4, save_interval_unsharded=4, model={"activation_type": "relu2"}, moe=True)
    asked = ["--to", "olmo", "--activation", "polyrelu"]
    assert cli.main(["convert", str(first.folder), str(tmp_path / "olmo"), *asked]) == 0
    starts = {
        "relu2": first.folder / "checkpoints" / "step4-unsharded",
        "polyrelu": tmp_path / "olmo" / STEP,
    }
    before, after = (
        train(max_duration=4, load_path=str(path), model={"activation_type": name}, **RESET, moe=True).series(
            "train/loss"
        )
        for name, path in starts.items()
    )
    assert after[1] == pytest.approx(before[1], abs=1e-6)
    assert after[4] < after[1] - 1e-2
