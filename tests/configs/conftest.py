"""Rehearsals by the trainers' own entries, on text that is made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from polycom_ext.runs import rehearse
from polycom_ext.runs.adapter import find
from polycom_ext.runs.record import TRAIN_LOSS, Record, read_metrics
from polycom_ext.runs.spec import Spec, load_each

from .test_paper import CONFIGS, PAPER


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the token files of rehearsals are made once."""
    return tmp_path_factory.mktemp("rehearsals")


@pytest.fixture
def in_text(text: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, to be in."""
    monkeypatch.chdir(text)
    return text


def runs(trainer: str) -> list[object]:
    """(config, activation) of each run of the paper; of each comparison the last one is in `make test`."""
    cells: list[object] = []
    for name in PAPER:
        specs = load_each(CONFIGS / f"{name}.yaml")
        for spec in specs if specs[0].trainer == trainer else ():
            marks = () if spec is specs[-1] else pytest.mark.long
            cells.append(pytest.param(name, spec.activation, id=f"{name}, {spec.activation}", marks=marks))
    return cells


def rehearsal(name: str, activation: str, *changes: str) -> Spec:
    """Of one run, with its token files; the trees are not looked at again."""
    [spec] = rehearse.load_each(CONFIGS / f"{name}.yaml", [f"activation={activation}", *changes])
    rehearse.make_data([spec])
    find(spec.trainer).validate(spec)
    find(spec.trainer).check_inputs(spec)
    return spec


def assert_trains(spec: Spec, folder: Path, steps: int) -> None:
    """Every step's loss is finite, it falls, and what the run is to leave at its end is there."""
    losses = read_metrics(Record(folder).metrics).series[TRAIN_LOSS]
    assert list(losses) == list(range(1, steps + 1))
    values = [*losses.values()]
    assert max(values) < 8
    assert sum(values[-3:]) / 3 < values[0] - 0.02
    assert find(spec.trainer).is_complete(spec, folder)
