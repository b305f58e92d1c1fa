"""What `polycom analyze` found in runs, in the report of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from polycom_ext.analysis.history import Moment
from polycom_ext.analysis.shapes import Shape
from polycom_ext.analysis.study import Activity, Layer, Study
from polycom_ext.cli import main
from polycom_ext.runs.record import Record

from .conftest import RunMaker, metrics

RANKS, STATES = "Effective rank of the FFN&#39;s weights", "Similarity of hidden states"
TRAINING = "Coefficients over training"


def study(activity: Activity | None = None, history: list[Moment] | None = None) -> Study:
    layers = [Layer({"up": [100.0 + layer], "down": [90.0]}, {"a₁": 0.3}, None) for layer in range(2)]
    return Study("somewhere", "polynorm", {"up": 192, "down": 192}, layers, activity, history or [])


def test_the_report_has_the_figures_of_runs_that_were_analyzed(make_run: RunMaker, tmp_path: Path) -> None:
    runs = [make_run(name, "polynorm", metrics(4.3)) for name in ("a", "b")]
    command = ["report", *map(str, runs), "--output"]
    assert main([*command, str(tmp_path / "without")]) == 0
    without = (tmp_path / "without" / "index.html").read_text()
    assert RANKS not in without
    Record(runs[0]).write_analysis(study().as_json())
    assert main([*command, str(tmp_path / "weights")]) == 0
    page = (tmp_path / "weights" / "index.html").read_text()
    assert RANKS in page
    assert STATES not in page
    seen = Activity(
        tokens=64,
        similarity=[[1.0, 0.5, 0.2], [0.5, 1.0, 0.6], [0.2, 0.6, 1.0]],
        constant=[0.0, 0.1],
        activation_rms=[0.7, 0.8],
        ffn_rms=[0.1, 0.2],
        hidden_rms=[1.0, 1.1],
        shapes=[Shape(1.0, [-1.0, 1.0], [0.0, 1.0]), None],
    )
    Record(runs[1]).write_analysis(study(seen).as_json())
    assert main([*command, str(tmp_path / "text")]) == 0
    page = (tmp_path / "text" / "index.html").read_text()
    assert RANKS in page
    assert STATES in page
    assert "Over 64 tokens" in page
    assert TRAINING not in page
    moments = [Moment(step, [{"a₁": 0.3 + step / 1e4}] * 2) for step in (200, 400)]
    Record(runs[1]).write_analysis(study(seen, moments).as_json())
    assert main([*command, str(tmp_path / "training")]) == 0
    assert TRAINING in (tmp_path / "training" / "index.html").read_text()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"layers": [{}], "activity": null}'])
def test_a_study_that_is_none_is_left_out_and_said(content: str, make_run: RunMaker, tmp_path: Path) -> None:
    run = make_run("a", "polynorm", metrics(4.3))
    Record(run).analysis.write_text(content)
    assert main(["report", str(run), "--output", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Left out" in page
    assert "analy" in page.partition("<section>")[0]
    assert RANKS not in page
