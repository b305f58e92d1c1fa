"""A checkpoint that is not whole is named, passed over for the one before, and moved aside, not deleted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron.adapter import MegatronAdapter
from polycom_ext.runs.spec import Spec

Damage = Callable[[Path], Any]


def make(**options: Any) -> Spec:
    given = {name.replace("_", "-"): value for name, value in {"train_iters": 8, **options}.items()}
    return Spec("run", "megatron", "polynorm", None, 2, {}, given)


FORMATS = {
    "torch_dist": make(),
    "torch": make(ckpt_format="torch", expert_model_parallel_size=2),
}
TRACKER = "latest_checkpointed_iteration.txt"


def save(format_: str, folder: Path) -> None:
    """A checkpoint in the files of real ones."""
    tensors = {name: torch.arange(1.0, 300) for name in ("a", "b")}
    if format_ == "torch_dist":
        dcp.save(tensors, checkpoint_id=folder, no_dist=True)
        torch.save({"iteration": 2}, folder / "common.pt")
        (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
        return
    for part in ("mp_rank_00_000", "mp_rank_00_001"):
        (folder / part).mkdir(parents=True)
        for name in ("model_optim_rng.pt", "distrib_optim.pt"):
            torch.save(tensors, folder / part / name)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    """Save at three steps; the folder of checkpoints."""

    def save_all(format_: str) -> Path:
        checkpoints = tmp_path / "checkpoints"
        for step in (2, 4, 6):
            save(format_, checkpoints / f"iter_{step:07d}")
        (checkpoints / TRACKER).write_text("6")
        return checkpoints

    return save_all


def cut(name: str) -> Damage:
    def damage(folder: Path) -> None:
        [path] = folder.glob(name)
        path.write_bytes(path.read_bytes()[:-30])

    return damage


def empty(name: str) -> Damage:
    return lambda folder: next(folder.glob(name)).write_bytes(b"")


def zero(name: str) -> Damage:
    """As a lost cache leaves a file: as long as it was."""

    def damage(folder: Path) -> None:
        [path] = folder.glob(name)
        path.write_bytes(path.read_bytes()[:1000] + bytes(path.stat().st_size - 1000))

    return damage


def remove(name: str) -> Damage:
    return lambda folder: next(folder.glob(name)).unlink()


DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "a truncated shard": ("torch_dist", cut("*.distcp"), "holds __0_0.distcp of"),
    "a missing shard": ("torch_dist", remove("*.distcp"), "lacks __0_0.distcp"),
    "zeros in a shard": ("torch_dist", zero("*.distcp"), "__0_0.distcp, in which zeros"),
    "no metadata": ("torch_dist", remove(".metadata"), "lacks .metadata"),
    "cut metadata": ("torch_dist", cut(".metadata"), ".metadata, which cannot be read"),
    "empty metadata": ("torch_dist", empty(".metadata"), ".metadata, which cannot be read"),
    "no common state": ("torch_dist", remove("common.pt"), "lacks common.pt"),
    "cut common state": ("torch_dist", cut("common.pt"), "holds common.pt without its end"),
    "no format": ("torch_dist", remove("metadata.json"), "lacks metadata.json"),
    "an empty format": ("torch_dist", empty("metadata.json"), "holds metadata.json of 0 bytes"),
    "a truncated part": ("torch", cut("*_001/model*"), "holds mp_rank_00_001/model_optim_rng.pt without its"),
    "an empty part": ("torch", empty("*_000/model*"), "holds mp_rank_00_000/model_optim_rng.pt of 0 bytes"),
    "zeros in a part": ("torch", zero("*_000/model*"), "holds mp_rank_00_000/model_optim_rng.pt without its"),
    "a missing part": ("torch", remove("*_001/model*"), "lacks mp_rank_00_001/model_optim_rng.pt"),
    "a missing optimizer": ("torch", remove("*_001/dist*"), "lacks mp_rank_00_001/distrib_optim.pt"),
}


@pytest.mark.parametrize("format_", FORMATS)
def test_a_whole_checkpoint_is_gone_on_from_and_nothing_moves(
    saved: Callable[[str], Path], format_: str
) -> None:
    checkpoints, adapter = saved(format_), MegatronAdapter()
    assert adapter.latest_step(FORMATS[format_], checkpoints.parent) == 6
    assert adapter.prepare_resume(FORMATS[format_], checkpoints.parent) == []
    assert (checkpoints / TRACKER).read_text() == "6"
    assert not (checkpoints / "damaged").exists()


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_one_is_passed_over_for_the_one_before(saved: Callable[[str], Path], kind: str) -> None:
    format_, damage, problem = DAMAGES[kind]
    checkpoints, adapter, spec = saved(format_), MegatronAdapter(), FORMATS[format_]
    newest = checkpoints / "iter_0000006"
    damage(newest)
    left = {path.relative_to(newest): path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    assert adapter.latest_step(spec, checkpoints.parent) == 4
    assert (checkpoints / TRACKER).read_text() == "6", "only asking changes nothing"
    [sentence] = adapter.prepare_resume(spec, checkpoints.parent)
    assert sentence.startswith(f"{newest} ")
    assert problem in sentence
    aside = checkpoints / "damaged" / "iter_0000006"
    assert str(aside) in sentence
    assert {p.relative_to(aside): p.read_bytes() for p in aside.rglob("*") if p.is_file()} == left
    assert (checkpoints / TRACKER).read_text() == "4"
    assert adapter.latest_step(spec, checkpoints.parent) == 4


@pytest.mark.parametrize("format_", FORMATS)
def test_where_all_are_damaged_none_is_written_over(saved: Callable[[str], Path], format_: str) -> None:
    checkpoints = saved(format_)
    shard = "*.distcp" if format_ == "torch_dist" else "*_000/model*"
    for folder in checkpoints.glob("iter_*"):
        cut(shard)(folder)
    with pytest.raises(PolycomError, match=r"no checkpoint is whole: \S*iter_0000006 holds .* move \S* away"):
        MegatronAdapter().latest_step(FORMATS[format_], checkpoints.parent)


def test_one_that_was_not_written_to_its_end_is_moved_out_of_the_way(saved: Callable[[str], Path]) -> None:
    """Killed while it saved step 8, which it will save again."""
    checkpoints, adapter = saved("torch_dist"), MegatronAdapter()
    save("torch_dist", checkpoints / "iter_0000008")
    remove(".metadata")(checkpoints / "iter_0000008")
    [sentence] = adapter.prepare_resume(make(), checkpoints.parent)
    assert "iter_0000008 lacks .metadata" in sentence
    assert adapter.latest_step(make(), checkpoints.parent) == 6
    assert (checkpoints / TRACKER).read_text() == "6"


def test_a_whole_one_behind_the_trackers_stays(saved: Callable[[str], Path]) -> None:
    """Somebody has written an earlier step into the tracker, to go on from there."""
    checkpoints, adapter = saved("torch_dist"), MegatronAdapter()
    (checkpoints / TRACKER).write_text("2")
    assert adapter.latest_step(make(), checkpoints.parent) == 2
    assert adapter.prepare_resume(make(), checkpoints.parent) == []
    assert (checkpoints / "iter_0000006").is_dir()


@pytest.mark.parametrize(
    ("text", "problem", "step"),
    [
        (b"", "is empty", 6),
        (b"\xff\x00", "cannot be read (it is no text)", 6),
        (b"four\n", "names 'four', which is no iteration", 6),
        (b"5", "names iteration 5, whose folder is not there", 4),
        (None, "is not there", 6),
    ],
)
def test_a_tracker_that_names_none_is_mended(
    saved: Callable[[str], Path], text: bytes | None, problem: str, step: int
) -> None:
    checkpoints, adapter = saved("torch_dist"), MegatronAdapter()
    (checkpoints / TRACKER).unlink()
    if text is not None:
        (checkpoints / TRACKER).write_bytes(text)
    assert adapter.latest_step(make(), checkpoints.parent) == step
    assert adapter.prepare_resume(make(), checkpoints.parent) == [f"{checkpoints / TRACKER} {problem}"]
    assert (checkpoints / TRACKER).read_text() == str(step)
