"""Loading a checkpoint: another run's, in every format, and what is refused in a sentence."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from polycom_ext.errors import PolycomError

from .conftest import Run, Trainer

Saved = Callable[[str], tuple[Run, Path]]

POLYNORM = {"activation_type": "polynorm"}
SHARDED: dict[str, Any] = {"processes": 2, "save_interval": 3}
UNSHARDED: dict[str, Any] = {"processes": 2, "save_interval": None, "save_interval_unsharded": 3}
UNSHARDED |= {"save_num_checkpoints_to_keep": 0}
HYBRID = {"sharding_strategy": "HYBRID_SHARD", "hybrid_sharding_num_model_replicas": 1}
KINDS = {
    "torch_legacy": (SHARDED, "step3"),
    "olmo_core": (SHARDED | {"sharded_checkpointer": "olmo_core"}, "step3"),
    "hybrid": (SHARDED | {"fsdp": HYBRID}, "step3"),
    "unsharded": (UNSHARDED, "step3-unsharded"),
    "DDP": (
        UNSHARDED | {"distributed_strategy": "ddp", "ddp": {"grad_sync_mode": "batch"}},
        "step3-unsharded",
    ),
}
COMMON: dict[str, Any] = {"moe": True, "model": POLYNORM, "optimizer": {"name": "adamw", "weight_decay": 0.5}}


@pytest.fixture(scope="module")
def saved(train: Trainer) -> Saved:
    """A run of six steps and the checkpoint of its third, by kind of checkpoint."""
    runs: dict[str, Run] = {}

    def make(kind: str) -> tuple[Run, Path]:
        settings, step = KINDS[kind]
        if kind not in runs:
            runs[kind] = train(**COMMON, **settings)
        return runs[kind], runs[kind].folder / "checkpoints" / step

    return make


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "torch_legacy" else pytest.mark.full) for kind in KINDS]
)
def test_a_run_goes_on_from_another_runs_checkpoint_as_that_run_did(
    train: Trainer, saved: Saved, kind: str
) -> None:
    if kind == "olmo_core":
        pytest.importorskip("olmo_core", reason="needs ai2-olmo-core==0.1.0")
    first, checkpoint = saved(kind)
    run = train(**COMMON, load_path=str(checkpoint), **KINDS[kind][0])
    assert run.statuses == [0, 0], run.log[-3000:]
    assert run.series("train/loss") == {step: first.series("train/loss")[step] for step in (4, 5, 6)}
    assert run.coefficients == first.coefficients


@pytest.mark.full
def test_a_sharded_checkpoint_is_unsharded_by_a_run_that_trains_nothing(train: Trainer, saved: Saved) -> None:
    first, checkpoint = saved("torch_legacy")
    run = train(**COMMON, load_path=str(checkpoint), dry_run=True, force_save_unsharded=True, **SHARDED)
    assert not run.metrics
    unsharded = run.folder / "checkpoints" / "step3-unsharded"
    resumed = train(**COMMON, load_path=str(unsharded), **UNSHARDED)
    assert resumed.series("train/loss") == {step: first.series("train/loss")[step] for step in (4, 5, 6)}


class Command:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def add_code(folder: Path) -> None:
    torch.save({"model": {}, "optim": Command()}, folder / "rank0.pt")


def name_another_activation(folder: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["activation_type"] = "polyrelu"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def remove_a_shard(folder: Path) -> None:
    (folder / "rank1.pt").unlink()


def add_safetensors(folder: Path) -> None:
    (folder / "rank0.safetensors").touch()


REFUSALS: dict[str, tuple[Callable[[Path], None] | None, dict[str, Any]]] = {
    "holds a .safetensors file, whose names OLMo unpickles": (add_safetensors, {}),
    "was trained with polyrelu, not polynorm": (name_another_activation, {}),
    "does not exist": (shutil.rmtree, {}),
    "was saved by 2 processes, and torch_legacy needs as many to read it, not 1": (None, {"processes": 1}),
    "was saved by 1 processes": (remove_a_shard, {}),
    "is no checkpoint of olmo_core": (None, {"load_path_sharded_checkpointer": "olmo_core"}),
    "holds more than OLMo's own checkpoints do": (add_code, {}),
}


@pytest.mark.parametrize("sentence", REFUSALS)
def test_what_could_not_be_loaded_is_refused_in_a_sentence(
    train: Trainer, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentence: str
) -> None:
    change, settings = REFUSALS[sentence]
    if "olmo_core" in sentence:
        pytest.importorskip("olmo_core", reason="needs ai2-olmo-core==0.1.0")
    folder = shutil.copytree(saved("torch_legacy")[1], tmp_path / "step3")
    if change is not None:
        change(folder)
    run = train(**COMMON | SHARDED | {"load_path": str(folder)} | settings)
    assert sentence in run.refusal
    assert "Traceback" not in run.log
    assert not run.metrics
    assert not os.path.exists("ran")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("torch_new", "cannot read"), ("local", "before 2.3"), ("olmo_core", "pip install")],
)
@pytest.mark.parametrize("option", ["sharded_checkpointer", "load_path_sharded_checkpointer"])
def test_a_format_that_does_not_work_here_is_refused_before_a_start(
    olmo: None, monkeypatch: pytest.MonkeyPatch, option: str, name: str, sentence: str
) -> None:
    from olmo.config import TrainConfig

    from polycom_ext.integrations.olmo.checkpoint import check_format

    monkeypatch.setitem(sys.modules, "olmo_core", None)
    with pytest.raises(PolycomError, match=f"^{option}: {name} .*{sentence}"):
        check_format(TrainConfig(**{option: name}))
