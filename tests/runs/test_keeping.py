"""keep_checkpoints: the newest whole ones of a run stay, and nothing that is not whole is removed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from polycom_ext.runs import keeping, plan


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The record of a run on Megatron that keeps two, with four checkpoints and a damaged one."""
    spec = {
        "name": "small",
        "trainer": "megatron",
        "activation": "polynorm",
        "keep_checkpoints": 2,
        "megatron": {"train-iters": 40, "ckpt-format": "torch"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(spec))
    for step in (2, 4, 6, 8, 10):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "iter_0000004" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"")
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("8")
    return tmp_path


def save(run_dir: Path, step: int) -> None:
    folder = run_dir / "checkpoints" / f"iter_{step:07d}" / "mp_rank_00"
    folder.mkdir(parents=True)
    torch.save({"iteration": step}, folder / "model_optim_rng.pt")


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in (run_dir / "checkpoints").glob("iter_*"))


def test_the_newest_whole_ones_up_to_the_trackers_stay(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "removing-iter_0000001").mkdir()
    keeping.prune(plan.recorded(run_dir))
    assert steps(run_dir) == [4, 6, 8, 10], "4 is damaged, 10 is not finished"
    assert not list((run_dir / "checkpoints").glob("removing-*"))


def test_a_damaged_one_does_not_count_as_one_to_keep(run_dir: Path) -> None:
    for step in (6, 8):
        (run_dir / "checkpoints" / f"iter_{step:07d}" / "mp_rank_00" / "model_optim_rng.pt").unlink()
    keeping.prune(plan.recorded(run_dir))
    assert steps(run_dir) == [2, 4, 6, 8, 10]


def test_all_stay_unless_the_spec_says_otherwise(run_dir: Path) -> None:
    path = run_dir / "run.yaml"
    path.write_text(path.read_text().replace("keep_checkpoints: 2\n", ""))
    keeping.prune(plan.recorded(run_dir))
    assert steps(run_dir) == [2, 4, 6, 8, 10]
