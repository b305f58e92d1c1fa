"""The record of a run: one home for its names, lines that survive a kill, refusals of many ranks at once."""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path

import pytest

import polycom_ext
from polycom_ext.errors import PolycomError
from polycom_ext.runs import record
from polycom_ext.runs.record import Record


def test_no_other_file_of_the_package_names_a_file_or_a_metric_of_a_run() -> None:
    files = [path.name for path in vars(Record(Path())).values()]
    metrics = [value for value in vars(record).values() if str(value).startswith("train/")]
    assert {"run.yaml", "metrics.jsonl", "checkpoints"} < {*files}
    assert {record.TRAIN_LOSS, record.MFU} < {*metrics}
    named = re.compile("[\"'](" + "|".join(map(re.escape, [*filter(None, files), *metrics])) + ")[\"']")
    package = Path(polycom_ext.__file__).parent
    found = [path for path in package.rglob("*.py") if named.search(path.read_text())]
    assert found == [package / "runs" / "record.py"]


def test_a_record_is_read_and_written_without_torch() -> None:
    code = "import sys; from polycom_ext.runs import record; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_line_that_was_written_is_the_line_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    assert record.read_metrics(path) == record.Metrics({}, None, 0)
    loss = record.evaluated(record.VALID, "c4/en", record.LOSS)
    record.append(path, 20, {record.TRAIN_LOSS: 5.25, loss: 5.5})
    record.append(path, 10, {record.TRAIN_LOSS: 5.75})
    with path.open("a") as file:
        file.write('{"step": 30, "metr')  # killed
    found = record.read_metrics(path)
    assert found == record.Metrics({record.TRAIN_LOSS: {10: 5.75, 20: 5.25}, loss: {20: 5.5}}, 10, 1)
    assert list(found.series[record.TRAIN_LOSS]) == [10, 20]
    assert record.labelled(found.series, record.VALID, record.LOSS) == {"c4/en": {20: 5.5}}


@pytest.mark.parametrize(("label", "name"), [("", "valid/loss"), ("c4", "valid/c4/loss")])
def test_a_label_is_found_again_in_its_name(label: str, name: str) -> None:
    assert record.evaluated("valid", label, "loss") == name
    assert record.label_of(name, "valid", "loss") == label
    assert record.label_of(name, "eval", "loss") is None
    assert record.label_of(name, "valid", "acc") is None


def test_the_validation_loss_is_the_mean_at_the_steps_at_which_all_texts_were_evaluated() -> None:
    series = {"valid/a/loss": {10: 4.0, 20: 3.0}, "valid/b/loss": {20: 5.0, 30: 1.0}, "train/loss": {20: 9.0}}
    assert record.validation(series) == {20: 4.0}
    assert record.validation({}) == {}


def refuse(arguments: tuple[Path, int]) -> None:
    record.refuse(arguments[0], f"rank {arguments[1]}\nsays " + "no " * 2000)


def test_of_the_refusals_of_all_ranks_one_stays_whole(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(8) as ranks:
        ranks.map(refuse, [(tmp_path, rank) for rank in range(64)], chunksize=1)
    first = Record(tmp_path).read_refusal()
    assert first is not None
    assert re.fullmatch(r"rank \d+ says( no){2000}", first)
    record.refuse(tmp_path, "later")
    assert Record(tmp_path).read_refusal() == first
    assert len(list(tmp_path.iterdir())) == 1, "nothing half-written"


def test_a_refusal_is_noted_with_its_attempt_and_forgotten_by_the_next(tmp_path: Path) -> None:
    run = Record(tmp_path)
    run.versions.write_text(json.dumps({"torch": "2.13.0", "attempts": []}))
    with run.log.open("ab") as log:
        run.begin_attempt(log, None)
        record.refuse(tmp_path, "it cannot be")
        run.end_attempt(2)
        run.begin_attempt(log, 4)
        run.end_attempt(0, complete=True)
    first, second = run.attempts()
    assert (first["refusal"], first["status"], first["complete"]) == ("it cannot be", 2, False)
    assert (second["refusal"], second["from_step"], second["complete"]) == (None, 4, True)
    assert run.read_versions()["torch"] == "2.13.0"
    assert run.log.read_text().count(": attempt ") == 2


@pytest.mark.parametrize("text", ["", "[]", '{"attempts": 3}', '{"attempts": ["once"]}'])
def test_attempts_that_cannot_be_read_are_no_attempts(tmp_path: Path, text: str) -> None:
    run = Record(tmp_path)
    run.versions.write_text(text)
    with pytest.raises(PolycomError, match="cannot be read as the versions and attempts of a run"):
        run.attempts()


def test_coefficients_are_read_as_they_were_written(tmp_path: Path) -> None:
    layers = [("layers.0.act", {"weight": [1.0, 0.5], "bias": [0.0]}), ("layers.1.act", {"beta": [1.5]})]
    Record(tmp_path).write_coefficients(record.coefficients(8, "polynorm-2", layers))
    learned = Record(tmp_path).read_coefficients()
    assert learned is not None
    assert (learned["step"], learned["activation"]) == (8, "polynorm-2")
    assert [(layer["name"], record.parameters(layer)) for layer in learned["layers"]] == layers
