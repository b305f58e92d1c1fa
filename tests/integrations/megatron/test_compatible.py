"""Megatron's own activations: checkpoints go between patched, unpatched and transformers' classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from polycom_ext import cli

from .conftest import Trainer
from .test_conversion import TOKENS, converted, options, trained
from .test_from_converted import STEPS, STRICTNESS, TP2

pytestmark = pytest.mark.full
CLASSES = {"gated": "LlamaForCausalLM", "ungated GELU": "ArceeForCausalLM"}
"""Model of test_conversion -> transformers' own class that computes it."""
MODELS = ["gated", pytest.param("ungated GELU", marks=pytest.mark.long)]


@pytest.mark.parametrize("model", MODELS)
def test_unpatched_upstream_and_ours_load_each_others(
    train: Trainer, train_unpatched: Trainer, model: str, tmp_path: Path
) -> None:
    checkpoint = trained(train_unpatched, model, tmp_path / "theirs")
    stock = converted(checkpoint, tmp_path / "hf")
    assert type(stock).__name__ == CLASSES[model]
    assert cli.main(["convert", str(tmp_path / "hf"), str(tmp_path / "onward"), "--to", "megatron"]) == 0
    again = converted(tmp_path / "onward", tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, stock(TOKENS).logits)

    def losses(trainer: Trainer, load: Path, *more: str, processes: int = 1) -> dict[int, float]:
        started = [*options(model), "--load", str(load), *STRICTNESS, *more]
        return trainer.exactly(*started, processes=processes, iterations=STEPS).series("train/loss")

    straight = losses(train_unpatched, tmp_path / "theirs", "--finetune")
    assert losses(train_unpatched, tmp_path / "onward") == straight
    assert losses(train, tmp_path / "onward") == straight
    assert losses(train_unpatched, tmp_path / "onward", *TP2, processes=2) == pytest.approx(
        straight, rel=1e-6
    )


@pytest.mark.long
def test_unpatched_upstream_loads_what_is_written_for_ranks(
    train: Trainer, train_unpatched: Trainer, tmp_path: Path
) -> None:
    trained(train, "gated", tmp_path / "ours")
    source, target = str(tmp_path / "ours"), str(tmp_path / "onward")
    assert cli.main(["convert", source, target, "--to", "megatron-torch", "--tensor-parallel", "2"]) == 0
    start = [*options("gated"), "--load"]
    straight = train.exactly(*start, source, "--finetune", *STRICTNESS, iterations=STEPS)
    onto = [target, "--ckpt-format", "torch", *TP2]
    onward = train_unpatched.exactly(*start, *onto, processes=2, iterations=STEPS)
    assert onward.series("train/loss") == pytest.approx(straight.series("train/loss"), rel=1e-6)
