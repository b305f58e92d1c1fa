"""Training goes on from what was converted, in any layout, as from the checkpoint that it was made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from polycom_ext import cli

from .conftest import Trainer
from .test_conversion import LAYOUTS, options, trained

STRICTNESS = ["--dist-ckpt-strictness", "assume_ok_unexpected"]
"""Upstream's default."""
STEPS = 3
TP2, PP2, EP2 = (f"--{kind}-model-parallel-size 2".split() for kind in ("tensor", "pipeline", "expert"))
ONTO: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "TP2": (2, TP2),
    "TP2, PP2": (4, [*TP2, *PP2]),
    "VPP": (2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]),
    "DP2": (2, ["--use-distributed-optimizer"]),
    "EP2": (2, [*EP2, "--use-distributed-optimizer"]),
    "ETP2": LAYOUTS["ETP2"][:2],
}

Losses = Callable[..., dict[int, float]]


@pytest.fixture(scope="module")
def losses(train: Trainer) -> Losses:
    """Losses by step of a model that starts from a folder."""

    def run(model: str, folder: Path, layout: str = "one process", *more: str) -> dict[int, float]:
        processes, listed = ONTO[layout]
        started = [*options(model), *listed, "--load", str(folder), *STRICTNESS, *more]
        return train.exactly(*started, processes=processes, iterations=STEPS).series("train/loss")

    return run


def assert_goes_on(losses: Losses, model: str, checkpoint: Path, layout: str, folder: Path) -> None:
    """Through Hugging Face's form into Megatron's, and on from there."""
    onward, hf = folder / "onward", folder / "hf"
    assert cli.main(["convert", str(checkpoint), str(hf), "--to", "hf"]) == 0
    assert cli.main(["convert", str(hf), str(onward), "--to", "megatron", "--shard-bytes", "20000"]) == 0
    straight = losses(model, checkpoint.parent, "one process", "--finetune")
    assert list(straight) == list(range(1, STEPS + 1))
    assert losses(model, folder / "own", layout, "--pretrained-checkpoint", str(onward)) == pytest.approx(
        straight, rel=1e-6
    )


def test_training_goes_on_in_another_layout(train: Trainer, losses: Losses, tmp_path: Path) -> None:
    checkpoint = trained(train, "polynorm", tmp_path / "trained")
    assert_goes_on(losses, "polynorm", checkpoint, "TP2", tmp_path)


PAIRS = [
    ("EP2, distributed optimizer", "ETP2"),
    ("TP2, PP2", "VPP"),
    ("ETP2", "EP2"),
    ("TP2, PP2", "DP2"),
    ("gated, TP2", "TP2, PP2"),
    ("gated, TP2", "one process"),
]
"""Of LAYOUTS, and of ONTO."""
IN_FULL = PAIRS[:2]


@pytest.mark.full
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [pytest.param(*pair, marks=() if pair in IN_FULL else pytest.mark.long) for pair in PAIRS],
)
def test_layouts_convert_into_each_other(
    train: Trainer, losses: Losses, saved: str, loaded: str, tmp_path: Path
) -> None:
    processes, layout, model = LAYOUTS[saved]
    model = "four layers" if loaded == "VPP" else model
    checkpoint = trained(train, model, tmp_path / "trained", layout, processes)
    assert_goes_on(losses, model, checkpoint, loaded, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(model, marks=pytest.mark.long)
        for model in ("grouped queries, tied", "biases", "layer norm", "normalised queries", "gated experts")
    ],
)
def test_training_of_any_model_goes_on(train: Trainer, losses: Losses, model: str, tmp_path: Path) -> None:
    assert_goes_on(losses, model, trained(train, model, tmp_path / "trained"), "one process", tmp_path)


@pytest.mark.full
def test_what_a_checkpoint_says_is_taken_over(train: Trainer, losses: Losses, tmp_path: Path) -> None:
    """--use-checkpoint-args of another width and activation."""
    checkpoint = trained(train, "polynorm", tmp_path / "trained")
    assert cli.main(["convert", str(checkpoint), str(tmp_path / "onward"), "--to", "megatron"]) == 0
    bare = options("polynorm")
    for option in ("--polycom-activation", "--ffn-hidden-size", "--num-layers"):
        at = bare.index(option)
        del bare[at : at + 2]
    load = ["--load", str(tmp_path / "onward"), "--use-checkpoint-args", *STRICTNESS]
    said = train.exactly(*bare, *load, iterations=STEPS).series("train/loss")
    assert said == pytest.approx(losses("polynorm", checkpoint.parent, "one process", "--finetune"), rel=1e-6)
