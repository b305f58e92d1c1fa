"""Reading run directories, also those that a killed or resumed process left."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from polycom_ext.errors import PolycomError
from polycom_ext.report.rundir import read

from .conftest import RunMaker, append, metrics


def test_of_lines_for_the_same_step_the_later_one_counts(make_run: RunMaker) -> None:
    run = make_run(
        "a", "polynorm", {10: {"train/loss": 5.0, "train/grad_norm": 1.0}, 20: {"train/loss": 4.0}}
    )
    append(run, {10: {"train/loss": 5.5}, 30: {"train/loss": 3.0}})
    logged = read(run).metrics
    assert list(logged["train/loss"].items()) == [(10, 5.5), (20, 4.0), (30, 3.0)]
    assert logged["train/grad_norm"] == {10: 1.0}


def test_a_half_written_line_is_counted_and_left_out(make_run: RunMaker) -> None:
    run = make_run("a", "polynorm", {10: {"train/loss": 5.0}})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "metrics": {"train/lo\n{"step": 30}\n')
    append(run, {20: {"train/loss": math.nan}})
    read_run = read(run)
    assert read_run.unreadable_lines == 2
    assert math.isnan(read_run.metrics["train/loss"][20])
    assert read_run.step == 20


def test_what_is_no_run_is_named_in_one_sentence(make_run: RunMaker, tmp_path: Path) -> None:
    with pytest.raises(PolycomError, match="is not a run directory"):
        read(tmp_path)
    with pytest.raises(PolycomError, match="never logged a metric"):
        read(make_run("silent", "polynorm"))
    broken = make_run("broken", "polynorm", metrics(4.3))
    (broken / "versions.json").write_text("{")
    with pytest.raises(PolycomError, match=r"versions\.json cannot be read"):
        read(broken)
    (broken / "run.yaml").write_text("name: broken\n")
    with pytest.raises(PolycomError, match="names no trainer"):
        read(broken)
