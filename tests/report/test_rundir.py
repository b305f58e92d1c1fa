"""Reading run directories, also those that a killed or resumed process left."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from polycom_ext.errors import PolycomError
from polycom_ext.report.results import Result
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
    assert read_run.problems == [f"{run / 'metrics.jsonl'}: 2 lines that cannot be read left out"]
    assert math.isnan(read_run.metrics["train/loss"][20])
    assert read_run.step == 20


def test_what_is_no_run_is_named_in_one_sentence(make_run: RunMaker, tmp_path: Path) -> None:
    with pytest.raises(PolycomError, match="is not a run directory"):
        read(tmp_path)
    with pytest.raises(PolycomError, match="never logged a metric"):
        read(make_run("silent", "polynorm"))
    broken = make_run("broken", "polynorm", metrics(4.3))
    (broken / "versions.json").write_text("{")
    assert "versions.json cannot be read" in read(broken).problems[0]
    (broken / "run.yaml").write_text("name: broken\n")
    with pytest.raises(PolycomError, match="names no trainer"):
        read(broken)


def evaluations(read_run: Result) -> dict[int, float]:
    return read_run.metrics["valid/loss"]


def test_an_evaluation_after_the_training_is_none_of_its_last_step(make_run: RunMaker) -> None:
    """Old versions left it there: other batches, and so another loss."""
    run = make_run("a", "gelu", {40: {"train/loss": 6.4}})
    for loss in (6.3720, 6.2915):
        append(run, {40: {"valid/loss": loss}})
    assert evaluations(read(run)) == {40: 6.3720}


def test_evaluations_of_steps_that_are_trained_again_count_anew(make_run: RunMaker) -> None:
    run = make_run("a", "gelu")
    for step in (10, 20, 30):
        append(run, {step: {"train/loss": 5.0}})
        append(run, {step: {"valid/loss": step / 10, "eval/piqa/acc": 0.5}})
    append(run, {20: {"train/loss": 5.0}})  # resumed from 10
    append(run, {20: {"valid/loss": 2.5, "eval/piqa/acc": 0.6}})
    assert evaluations(read(run)) == {10: 1.0, 20: 2.5, 30: 3.0}
    append(run, {30: {"train/loss": 5.0}})
    append(run, {30: {"valid/loss": 3.5}})
    append(run, {30: {"valid/loss": 9.9}})
    assert evaluations(read(run)) == {10: 1.0, 20: 2.5, 30: 3.5}
    assert read(run).metrics["eval/piqa/acc"] == {10: 0.5, 20: 0.6, 30: 0.5}
    append(run, {30: {"train/loss": 5.0}})  # resumed from 20 or later: no step between is logged
    append(run, {30: {"valid/loss": 3.6}})
    assert evaluations(read(run)) == {10: 1.0, 20: 2.5, 30: 3.6}


def test_numbers_that_are_none_are_infinite_or_left_out(make_run: RunMaker) -> None:
    run = make_run("a", "gelu", {10: {"train/loss": 5.0}})
    digits = "1" + "0" * 400
    with (run / "metrics.jsonl").open("a") as file:
        for value in ("1e400", "-1e308", "Infinity", digits):
            file.write(f'{{"step": 20, "metrics": {{"train/{value[:5]}": {value}}}}}\n')
        for step in ("1e400", "NaN", '"x"', "-1", "1e300"):
            file.write(f'{{"step": {step}, "metrics": {{"train/loss": 4.0}}}}\n')
    found = read(run)
    assert "5 lines that cannot be read" in found.problems[0]
    assert [found.metrics[f"train/{name}"][20] for name in ("1e400", "-1e30", "Infin", digits[:5])] == [
        math.inf,
        -math.inf,
        math.inf,
        math.inf,
    ]


def test_secrets_of_the_environment_are_not_read(make_run: RunMaker) -> None:
    environment = {"HF_TOKEN": "hf_abc def", "PORT": "1", "API_KEY": 1234}
    run = make_run("a", "gelu", {10: {"train/loss": 5.0}}, environment=environment)
    script = "env HF_TOKEN='hf_abc def' PORT=1 API_KEY=1234 python --seed 1234\n"
    (run / "command.sh").write_text(script)
    found = read(run)
    assert found.command == "env HF_TOKEN=${HF_TOKEN} PORT=1 API_KEY=${API_KEY} python --seed 1234"
    assert (
        found.spec.environment
        == found.resolved["environment"]
        == {"HF_TOKEN": "${HF_TOKEN}", "PORT": "1", "API_KEY": "${API_KEY}"}
    )
