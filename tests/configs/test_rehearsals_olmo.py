"""The paper's runs on OLMo's MoE branch train in small, and are evaluated under their labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polycom_ext.runs.adapter import find
from polycom_ext.runs.record import Record, read_metrics
from polycom_ext.runs.spec import Spec

from ..integrations.olmo.conftest import (  # noqa: F401  # fixtures
    Trainer,
    branch_paths,
    inputs,
    train_branch,
    train_on,
    tree,
)
from .conftest import assert_trains, rehearsal, runs

STEPS = 4
TASKS = ("copa",)
"""Of the tasks in the loop: each of the others is read in seconds, by every rank."""


@pytest.mark.parametrize(("name", "activation"), runs("olmo"))
def test_a_run_trains_in_small(
    train_branch: Trainer,  # noqa: F811
    in_text: Path,
    tmp_path: Path,
    name: str,
    activation: str,
) -> None:
    whole = rehearsal(name, activation)
    kept = [
        one for one in whole.options["evaluators"] if one.get("type") != "downstream" or one["label"] in TASKS
    ]
    changes = [f"olmo.max_duration={STEPS}", f"olmo.save_interval={STEPS}", f"olmo.eval_interval={STEPS}"]
    spec = rehearsal(name, activation, *changes, f"olmo.evaluators={json.dumps(kept)}")
    trains(train_branch, spec, tmp_path / "run", STEPS)
    series = read_metrics(Record(tmp_path / "run").metrics).series
    labels = {f"valid/{label}/loss" for label in kept[0]["data"]["datasets"]}
    assert len(labels & series.keys()) > 1
    assert "eval/copa/acc" in series


@pytest.mark.long
def test_all_of_it_trains_in_small(train_branch: Trainer, in_text: Path, tmp_path: Path) -> None:  # noqa: F811
    trains(train_branch, rehearsal("moe-1b-7b/olmo", "polynorm"), tmp_path / "run", 20)


def trains(train: Trainer, spec: Spec, folder: Path, steps: int) -> None:
    folder.mkdir()
    adapter = find(spec.trainer)
    for file, text in adapter.files(spec, folder).items():
        (folder / file).write_text(text)
    _, _, *arguments = adapter.arguments(spec, folder)
    run = train.exactly(*arguments, processes=spec.world_size, folder=folder)
    assert run.statuses == [0] * spec.world_size
    assert_trains(spec, folder, steps)
