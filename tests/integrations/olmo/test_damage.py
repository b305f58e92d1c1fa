"""A checkpoint that is not whole is named, passed over for the one before, and moved aside, not deleted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polycom_ext.errors import PolycomError
from polycom_ext.integrations.olmo.adapter import OLMoAdapter
from polycom_ext.runs.spec import Spec

from .conftest import Trainer

Damage = Callable[[Path], Any]
SPEC = Spec("run", "olmo", "polynorm", None, 2, {}, {"max_duration": 8})
STATE = {"global_step": 2, "world_size": 2, "checkpoints": [Path("step2")]}
KINDS = {"unsharded": "step{}-unsharded", "torch_legacy": "step{}", "olmo_core": "step{}"}


def save(kind: str, folder: Path) -> None:
    """A checkpoint in the files of real ones."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {}\n")
    weights = {"weight": torch.arange(1.0, 300)}
    if kind == "unsharded":
        for part in ("model", "optim", "train"):
            torch.save(STATE if part == "train" else weights, folder / f"{part}.pt")
    elif kind == "torch_legacy":
        for rank in (0, 1):
            torch.save({"model": weights, "optim": {}, **STATE}, folder / f"rank{rank}.pt")
    else:
        for part in ("model", "optim", "train"):
            (folder / part).mkdir()
        for rank in (0, 1):
            torch.save(STATE, folder / "train" / f"rank{rank}.pt")
            for part in ("model", "optim"):
                save_safetensors(folder / part / f"rank_{rank}.safetensors")
        for part in ("model", "optim"):
            files = {f"rank_{rank}.safetensors": {"flattened_offsets": [[0, 4]]} for rank in (0, 1)}
            about = {"tensors": {"weight": {"shape": [8], "shard_spec_per_file": files}}}
            (folder / part / "metadata.json").write_text(json.dumps(about))


def save_safetensors(path: Path) -> None:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(64)))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    """Save at three steps; the folder of checkpoints."""

    def save_all(kind: str) -> Path:
        for step in (2, 4, 6):
            save(kind, tmp_path / "checkpoints" / KINDS[kind].format(step))
        (tmp_path / "checkpoints" / "step8-tmp").mkdir()
        return tmp_path / "checkpoints"

    return save_all


def cut(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-30])


def empty(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes(b"")


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "a cut model": ("unsharded", cut("model.pt"), "holds model.pt without its end"),
    "an empty optimizer": ("unsharded", empty("optim.pt"), "holds optim.pt of 0 bytes"),
    "no trainer state": ("unsharded", remove("train.pt"), "lacks train.pt"),
    "no configuration": ("unsharded", remove("config.yaml"), "lacks config.yaml"),
    "a cut rank": ("torch_legacy", cut("rank1.pt"), "holds rank1.pt without its end"),
    "a missing last rank": ("torch_legacy", remove("rank1.pt"), "lacks rank1.pt"),
    "a missing first rank": ("torch_legacy", remove("rank0.pt"), "lacks rank0.pt"),
    "a truncated shard": ("olmo_core", cut("model/rank_1.safetensors"), "holds model/rank_1.safetensors of"),
    "a missing shard": ("olmo_core", remove("optim/rank_0.safetensors"), "lacks optim/rank_0.safetensors"),
    "no metadata": ("olmo_core", remove("model/metadata.json"), "lacks model/metadata.json"),
    "empty metadata": ("olmo_core", empty("optim/metadata.json"), "holds optim/metadata.json of 0 bytes"),
    "a missing state": ("olmo_core", remove("train/rank1.pt"), "lacks train/rank1.pt"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_checkpoint_is_gone_on_from_and_nothing_moves(
    saved: Callable[[str], Path], kind: str
) -> None:
    checkpoints, adapter = saved(kind), OLMoAdapter()
    assert adapter.latest_step(SPEC, checkpoints.parent) == 6
    assert adapter.prepare_resume(SPEC, checkpoints.parent) == []
    assert not (checkpoints / "damaged").exists()


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_one_is_passed_over_for_the_one_before(saved: Callable[[str], Path], what: str) -> None:
    kind, damage, problem = DAMAGES[what]
    checkpoints, adapter = saved(kind), OLMoAdapter()
    newest = checkpoints / KINDS[kind].format(6)
    damage(newest)
    files = {path.relative_to(newest) for path in newest.rglob("*")}
    assert adapter.latest_step(SPEC, checkpoints.parent) == 4
    assert newest.exists(), "only asking changes nothing"
    [sentence] = adapter.prepare_resume(SPEC, checkpoints.parent)
    assert sentence.startswith(f"{newest} {problem}")
    aside = checkpoints / "damaged" / newest.name
    assert str(aside) in sentence
    assert {path.relative_to(aside) for path in aside.rglob("*")} == files
    assert adapter.latest_step(SPEC, checkpoints.parent) == 4


def test_of_one_step_the_unsharded_one_serves_where_the_sharded_one_is_damaged(
    saved: Callable[[str], Path],
) -> None:
    checkpoints = saved("torch_legacy")
    save("unsharded", checkpoints / "step6-unsharded")
    cut("rank0.pt")(checkpoints / "step6")
    assert OLMoAdapter().latest_step(SPEC, checkpoints.parent) == 6
    assert len(OLMoAdapter().prepare_resume(SPEC, checkpoints.parent)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_where_all_are_damaged_none_is_written_over(saved: Callable[[str], Path], kind: str) -> None:
    checkpoints = saved(kind)
    for config in checkpoints.glob("step*/config.yaml"):
        config.unlink()
    with pytest.raises(PolycomError, match=r"no checkpoint is whole: \S*step6\S* lacks .* move \S* away"):
        OLMoAdapter().latest_step(SPEC, checkpoints.parent)


@pytest.mark.full
@pytest.mark.parametrize(
    ("settings", "newest", "file"),
    [
        ({"save_interval": 3}, "step6", "rank1.pt"),
        ({"save_interval": 3, "sharded_checkpointer": "olmo_core"}, "step6", "optim/rank_1.safetensors"),
    ],
    ids=["torch_legacy", "olmo_core"],
)
def test_a_trainer_whose_newest_is_damaged_trains_on_from_the_one_before(
    train: Trainer, settings: dict[str, Any], newest: str, file: str
) -> None:
    run = train(processes=2, **settings)
    assert OLMoAdapter().latest_step(SPEC, run.folder) == 6, "what OLMo writes is whole"
    cut(file)(run.folder / "checkpoints" / newest)
    again = train(processes=2, folder=run.folder, **settings)
    assert "checkpoints/step3" in again.log.partition("Loading ")[2].splitlines()[0]
    assert again.series("train/loss") == run.series("train/loss")
    assert OLMoAdapter().latest_step(SPEC, run.folder) == 6, "and so it is when it was written again"
