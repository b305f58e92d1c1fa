"""The same training whatever the strategy and the number of ranks: from scratch, and from a checkpoint."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import Run, Trainer

Straight = Callable[[str, bool], Run]
SETTINGS = {
    "device_train_microbatch_size": 1,  # so that the routers' losses are of the same micro-batches everywhere
    "max_grad_norm": 0.1,  # so that every step is clipped
    "no_pre_train_checkpoint": False,
    "save_interval": None,
    "save_interval_unsharded": 2,
    "max_duration": 4,
    "save_num_checkpoints_to_keep": 0,
}
DDP: dict[str, Any] = {"distributed_strategy": "ddp", "ddp": {"grad_sync_mode": "batch"}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "FSDP": {"processes": 2, "model": {"init_device": "meta"}},
    "NO_SHARD": {"processes": 2, "fsdp": {"sharding_strategy": "NO_SHARD"}},
    "DDP": {"processes": 2} | DDP,
}
FULL_LAYOUTS: dict[str, dict[str, Any]] = {
    "FSDP from the CPU": {"processes": 2},
    "FSDP as one unit": {"processes": 2, "fsdp": {"wrapping_strategy": None}},
    "FSDP on 4 ranks": {"processes": 4, "fsdp": {"wrapping_strategy": "size_based"}},
    "hybrid": {
        "processes": 4,
        "fsdp": {"sharding_strategy": "HYBRID_SHARD", "hybrid_sharding_num_model_replicas": 2},
    },
}
FULL = pytest.mark.full
POLYNORM: dict[str, Any] = {"activation_type": "polynorm", "init_cutoff_factor": 3.0}


def run_of(train: Trainer, name: str, moe: bool, **settings: object) -> Run:
    """Four steps in a layout."""
    layout = (LAYOUTS | FULL_LAYOUTS)[name]
    model = POLYNORM | layout.get("model", {})
    return train(moe=moe, **(SETTINGS | layout | {"model": model} | settings))


@pytest.fixture(scope="module")
def straight(train: Trainer) -> Straight:
    """The run of a layout from scratch, once each."""
    return cache(lambda name, moe: run_of(train, name, moe))


def initial_weights(run: Run) -> dict[str, torch.Tensor]:
    return torch.load(run.folder / "checkpoints" / "step0-unsharded" / "model.pt")


def assert_same_training(run: Run, expected: Run, steps: list[int]) -> None:
    for name in ("train/loss", "train/grad_norm"):
        actual, wanted = run.series(name), expected.series(name)
        assert list(actual) == steps
        assert actual == pytest.approx({step: wanted[step] for step in steps}, rel=1e-5), name


CASES = [
    *(pytest.param(name, False, id=name) for name in LAYOUTS),
    *(pytest.param(name, False, id=name, marks=FULL) for name in FULL_LAYOUTS),
    *(pytest.param(name, True, id=f"MoE, {name}", marks=FULL) for name in LAYOUTS),
]


@pytest.mark.parametrize(("name", "moe"), CASES[1:])
def test_a_training_from_scratch_is_the_same_under_every_strategy(
    straight: Straight, name: str, moe: bool
) -> None:
    expected, run = straight("one process", moe), straight(name, moe)
    weights, wanted = initial_weights(run), initial_weights(expected)
    assert [key for key in wanted if not torch.equal(weights[key], wanted[key])] == []
    assert_same_training(run, expected, steps=[1, 2, 3, 4])
    assert min(run.series("train/grad_norm").values()) > 0.2, "clipping had something to do"


def test_the_embedding_and_the_output_layer_start_apart(straight: Straight) -> None:
    weights = initial_weights(straight("FSDP", False))
    pair = torch.stack([weights[f"transformer.{name}.weight"].flatten() for name in ("wte", "ff_out")])
    assert abs(pair.corrcoef()[0, 1].item()) < 0.05


@pytest.mark.parametrize(
    ("saved", "name", "moe"),
    [
        ("FSDP", "DDP", False),
        ("DDP", "FSDP", False),
        pytest.param("FSDP", "NO_SHARD", False, marks=FULL),
        pytest.param("DDP", "one process", False, marks=FULL),
        pytest.param("FSDP", "DDP", True, marks=FULL),
        pytest.param("DDP", "FSDP", True, marks=FULL),
    ],
)
def test_an_unsharded_checkpoint_is_resumed_under_another_strategy(
    train: Trainer, straight: Straight, tmp_path: Path, saved: str, name: str, moe: bool
) -> None:
    before = straight(saved, moe)
    checkpoint = Path("checkpoints", "step2-unsharded")
    shutil.copytree(before.folder / checkpoint, tmp_path / checkpoint)
    resumed = run_of(train, name, moe, folder=tmp_path)
    assert_same_training(resumed, before, steps=[3, 4])


def test_a_rank_a_replica_is_refused(train: Trainer) -> None:
    settings = {"sharding_strategy": "HYBRID_SHARD", "hybrid_sharding_num_model_replicas": 2}
    assert "leave nothing to shard" in train(processes=2, fsdp=settings).refusal


def test_a_sharded_checkpoint_is_refused_under_ddp(train: Trainer, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"rank{rank}.pt").touch()
    run = train(processes=2, load_path=str(tmp_path), **DDP, save_interval_unsharded=2)
    assert "is a sharded checkpoint, which distributed_strategy: ddp cannot read" in run.refusal


@pytest.mark.full
@pytest.mark.github
@pytest.mark.parametrize("name", ["FSDP", "DDP"])
def test_a_training_from_scratch_is_the_same_on_the_branch(train_branch: Trainer, name: str) -> None:
    expected, run = (run_of(train_branch, layout, True) for layout in ("one process", name))
    assert_same_training(run, expected, steps=[1, 2, 3, 4])
