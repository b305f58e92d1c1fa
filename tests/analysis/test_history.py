"""Coefficients over training: of each checkpoint of a run that is whole, and nothing else of it is read."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from polycom_ext.checkpoints.sharded import Folder
from polycom_ext.cli import main
from polycom_ext.runs.record import Record

from ..integrations.huggingface.conftest import made

STEPS = (100, 200, 300)


def value(step: int, layer: int) -> float:
    """What a₁ is."""
    return step / 1024 + layer


def run_of(folder: Path, kind: str, steps: tuple[int, ...] = STEPS) -> Path:
    """A run's directory with checkpoints of Megatron's form at these steps."""
    checkpoints = Record(folder / kind).checkpoints
    checkpoints.mkdir(parents=True)
    for step in steps:
        model: Any = made(kind)
        with torch.no_grad():
            for index, layer in enumerate(model.model.layers):
                for parameter in layer.mlp.act_fn.parameters():
                    parameter[-1] = value(step, index)
        model.save_pretrained(folder / f"hf-{kind}-{step}")
        target = folder / f"megatron-{kind}-{step}"
        assert main(["convert", str(folder / f"hf-{kind}-{step}"), str(target), "--to", "megatron"]) == 0
        (target / "release").rename(checkpoints / f"iter_{step:07d}")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(steps[-1]))
    Record(folder / kind).spec.write_text(f"trainer: megatron\nactivation: {kind}\n")
    return folder / kind


def analyzed(run: Path, output: Path) -> list[dict[str, str]] | None:
    assert main(["analyze", str(run), "--output", str(output)]) == 0
    table = output / "coefficients-over-training.csv"
    if not table.exists():
        return None
    with table.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_checkpoint_of_a_run_has_its_coefficients_in_the_table_the_figure_and_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, "polynorm")
    read: list[tuple[str, str]] = []
    whole = Folder.read

    def noted(self: Folder, name: str, index: tuple[int, ...] = ()) -> torch.Tensor:
        read.append((self.path.name, name))
        return whole(self, name, index)

    monkeypatch.setattr(Folder, "read", noted)
    rows = analyzed(run, tmp_path / "out")
    assert rows is not None
    found = {(int(row["step"]), int(row["layer"]), row["coefficient"]): float(row["value"]) for row in rows}
    assert len(found) == len(rows) == len(STEPS) * 2 * 4
    for step in STEPS:
        assert [found[step, layer, "a₁"] for layer in range(2)] == [value(step, layer) for layer in range(2)]
    assert (tmp_path / "out" / "analysis-coefficients-over-training.png").is_file()
    kept = Record(run).read_analysis()
    assert kept is not None
    assert [moment["step"] for moment in kept["history"]] == list(STEPS)
    earlier = [name for folder, name in read if folder != "iter_0000300"]
    assert earlier
    assert all("activation_func" in name for name in earlier)


def test_a_checkpoint_that_is_not_whole_or_of_no_model_that_is_known_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, "polynorm", (100, 200, 300, 400))
    checkpoints = Record(run).checkpoints
    metadata = checkpoints / "iter_0000100" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:50])
    torch.save({"args": None}, checkpoints / "iter_0000200" / "common.pt")
    rows = analyzed(run, tmp_path / "out")
    assert rows is not None
    assert {row["step"] for row in rows} == {"300", "400"}
    said = capsys.readouterr().err
    assert "passed over: " in said
    assert "iter_0000200/common.pt holds no arguments" in said
    torch.save({"args": None}, checkpoints / "iter_0000300" / "common.pt")
    assert analyzed(run, tmp_path / "one that is left") is None


def test_nothing_is_told_of_one_checkpoint_or_of_what_does_not_learn(tmp_path: Path) -> None:
    assert analyzed(run_of(tmp_path, "polynorm", (100,)), tmp_path / "one") is None
    assert analyzed(run_of(tmp_path, "relu"), tmp_path / "relu") is None


def test_a_spec_that_cannot_be_read_costs_the_history_and_not_the_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, "polynorm")
    Record(run).spec.write_text("trainer: none-such\nactivation: polynorm\n")
    assert analyzed(run, tmp_path / "out") is None
    said = capsys.readouterr().err
    assert "polynorm: its earlier checkpoints are not looked at: " in said
    assert "unknown trainer 'none-such'" in said
