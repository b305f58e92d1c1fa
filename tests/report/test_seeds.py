"""Several seeds of an activation: mean, spread, differences of the same seed, speedups, what is left out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from polycom_ext import cli
from polycom_ext.report.families import Family, families
from polycom_ext.report.rundir import read
from polycom_ext.report.sentence import summarize
from polycom_ext.report.tables import differences, speedups

from .conftest import DENSE, Metrics, RunMaker, metrics

TOKENS = 16 * 128
"""Of a step of DENSE."""


@pytest.fixture
def seeded(make_run: RunMaker) -> RunMaker:
    """seeded(activation, seed, metrics) as make_run."""

    def make(activation: str, seed: int | None, logged: Metrics, **more: object) -> Path:
        options = {**DENSE, "seed": seed} if seed is not None else DENSE
        return make_run(f"{activation}-{seed}", activation, logged, options=options, **more)

    return make


def family(*runs: Path) -> Family:
    (found,) = families([read(run) for run in runs])
    return found


def falling(start: float, slope: float, seconds: float = 1.0, steps: int = 400) -> Metrics:
    """A validation loss that is a straight line, by 100 steps, and the time of a step."""
    return {
        step: {
            "train/loss": start - slope * step,
            "train/step_seconds": seconds,
            "valid/loss": start - slope * step,
        }
        for step in range(100, steps + 1, 100)
    }


def test_a_group_has_mean_and_sample_standard_deviation(seeded: RunMaker, tmp_path: Path) -> None:
    starts = {"swiglu": (7.0, 7.2, 7.4), "polynorm": (6.8, 7.1, 7.1)}
    runs = [
        seeded(name, seed, falling(start, 0.01))
        for name, several in starts.items()
        for seed, start in enumerate(several)
    ]
    found = family(*runs)
    assert [group.label for group in found.groups] == ["SwiGLU", "PolyNorm"]
    losses = found.groups[1].final("validation")
    assert losses.to_dict() == pytest.approx({"0": 2.8, "1": 3.1, "2": 3.1})
    of_the_same_seed = differences(found)["PolyNorm"].loc[400]
    assert of_the_same_seed.to_dict() == pytest.approx({"0": -0.2, "1": -0.1, "2": -0.3})
    assert cli.main(["report", *map(str, runs), "--output", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "3.000 ± 0.173<small>−0.200 ± 0.100</small>" in page
    assert "3 seeds" in page
    ended = "PolyNorm ended at validation loss {} against SwiGLU&#39;s {} after 400 steps, the mean"
    assert f"{ended.format('3.00', '3.20')} of 3 seeds;" in page
    assert summarize([family(*runs[:-1])]) == (
        ended.replace("&#39;", "'").format("2.95", "3.20")
        + "s of 2 and 3 seeds; a rehearsal that does not reproduce the paper."
    )
    frame = pd.read_csv(tmp_path / "report" / "groups.csv").set_index("group")
    assert frame["seeds"].to_dict() == {"SwiGLU": 3, "PolyNorm": 3}
    assert frame.loc["PolyNorm", "validation_loss_mean"] == pytest.approx(3.0)
    assert frame.loc["PolyNorm", "validation_loss_std"] == pytest.approx(0.173, abs=1e-3)
    frame = pd.read_csv(tmp_path / "report" / "results.csv")
    assert frame["seed"].tolist() == [0, 1, 2, 0, 1, 2]
    assert frame["counted"].all()


def test_the_speedup_is_the_baseline_s_tokens_over_those_to_its_final_loss(seeded: RunMaker) -> None:
    """Of the same seed where there is one: 9 − 0.02 x is 2.9 after 305 steps, between two evaluations."""
    found = family(
        seeded("swiglu", 1, falling(6.9, 0.01)),
        seeded("swiglu", 2, falling(7.1, 0.01)),
        seeded("relu", 1, falling(9.0, 0.01)),
        seeded("polynorm", 1, falling(9.0, 0.02, seconds=2.0)),
        seeded("polynorm", 2, falling(8.0, 0.02, seconds=0.5)),
        seeded("polynorm", 3, falling(8.0, 0.02, seconds=0.5)),
        seeded("polyrelunorm", 1, falling(2.0, 0.001)),
    )
    faster = speedups(found, "tokens")
    assert faster["SwiGLU"].to_dict() == {"1": 1.0, "2": 1.0}
    assert faster["PolyNorm"].to_dict() == pytest.approx({"1": 400 / 305, "2": 400 / 245, "3": 400 / 250})
    assert faster["PolyReLUNorm"].to_dict() == {"1": 4.0}  # there at its first evaluation
    assert math.isnan(faster["ReLU"]["1"])
    assert found.groups[2].along(pd.Index([300]), "tokens")[0] == 300 * TOKENS
    hours = found.groups[2].along(pd.Index([300]), "hours")[0]
    assert hours == pytest.approx(np.mean([300 * 2.0, 300 * 0.5, 300 * 0.5]) / 3600)
    assert speedups(found, "hours")["PolyNorm"]["1"] == pytest.approx(400 / 305)


def test_what_is_unfinished_is_left_out_of_a_mean_while_another_has_finished(seeded: RunMaker) -> None:
    unfinished = seeded("polynorm", 1, falling(7, 0.01, steps=300))
    found = family(seeded("swiglu", 1, falling(7, 0.01)), unfinished).groups[1]
    assert (found.progress, found.remarks) == ("300 of 400", [])
    found = family(unfinished, seeded("polynorm", 2, falling(8, 0.01))).groups[0]
    assert found.final("validation").to_dict() == {"2": 4.0}
    assert found.remarks == ["seed 1 left out: at step 300 of 400, evaluated at 300"]
    not_yet = falling(6, 0.01)
    del not_yet[400]["valid/loss"]
    whole, torn = seeded("polynorm", 3, falling(8, 0.01)), seeded("polynorm", 4, not_yet)
    found = family(unfinished, whole, torn).groups[0]
    assert found.final("validation").to_dict() == {"3": 4.0}
    assert found.remarks[1] == "seed 4 left out: at step 400, evaluated at 300"


def test_runs_without_a_seed_in_common_have_no_difference(seeded: RunMaker, tmp_path: Path) -> None:
    runs = [seeded("swiglu", 1, metrics(4.5)), seeded("polynorm", 2, metrics(4.3))]
    assert differences(family(*runs)).empty
    assert cli.main(["report", *map(str, runs), "--output", str(tmp_path / "report")]) == 0
    assert "It has no seed in common with PolyNorm." in (tmp_path / "report" / "index.html").read_text()


def test_a_seed_that_diverged_makes_no_mean(seeded: RunMaker, tmp_path: Path) -> None:
    diverged = falling(7, 0.01)
    diverged[400] = dict.fromkeys(diverged[400], math.nan)
    runs = [seeded("relu", 1, diverged), seeded("relu", 2, falling(7, 0.01)), seeded("gelu", 1, diverged)]
    assert family(*runs).groups[1].remarks == ["seed 1 not finite from step 400"]
    assert cli.main(["report", *map(str, runs), "--output", str(tmp_path / "report")]) == 0
    assert ">not finite" in (tmp_path / "report" / "index.html").read_text()


def attempt(host: str, started: str, ended: str | None) -> dict[str, object]:
    day = "2026-01-02T{}:00+00:00"
    return {"host": host, "started": day.format(started), **({"ended": day.format(ended)} if ended else {})}


@pytest.mark.parametrize(
    ("second", "slow", "reason"),
    [
        (attempt("a", "04:00", "05:00"), 1.0, ""),
        (attempt("a", "03:30", "05:00"), 1.0, "swiglu-1 and gelu-1 shared a machine"),
        (attempt("b", "04:00", "05:00"), 1.0, "they ran on different machines (a, b)"),
        (attempt("a", "04:00", None), 1.0, "the record of gelu-1 does not say where and until when it ran"),
        ({"host": "a"}, 1.0, "the record of gelu-1 does not say where and until when it ran"),
        (attempt("a", "04:00", "05:00"), 3.0, "something else slowed gelu-1 down, for 33% of its time"),
    ],
)
def test_times_compare_runs_that_had_one_machine_to_themselves(
    second: dict[str, object], slow: float, reason: str, seeded: RunMaker
) -> None:
    runs = []
    for name, one in {"swiglu": attempt("a", "03:00", "04:00"), "gelu": second}.items():
        logged = falling(7, 0.01)
        logged[400]["train/step_seconds"] = slow if name == "gelu" else 1.0
        runs.append(seeded(name, 1, logged))
        (runs[-1] / "versions.json").write_text(json.dumps({"attempts": [one]}))
    assert family(*runs).untimely == reason


def test_the_page_has_a_speedup_in_time_where_times_compare(seeded: RunMaker, tmp_path: Path) -> None:
    pages: list[str] = []
    for end in ("04:00", "04:01"):
        first = seeded("swiglu", len(pages), falling(7, 0.01))
        run = seeded("gelu", len(pages), falling(7, 0.02))
        (first / "versions.json").write_text(json.dumps({"attempts": [attempt("a", "03:00", end)]}))
        (run / "versions.json").write_text(json.dumps({"attempts": [attempt("a", "04:00", "05:00")]}))
        assert cli.main(["report", str(first), str(run), "--output", str(tmp_path / "report")]) == 0
        pages.append((tmp_path / "report" / "index.html").read_text())
    assert "in time 2.00×" in pages[0]
    assert "in time 2.00×" not in pages[1]
    assert "Times do not compare activations: swiglu-1 and gelu-1 shared a machine." in pages[1]
