"""What Megatron tells its TensorBoard writer is in metrics.jsonl, a line a step."""

import json
from pathlib import Path

import pytest

from polycom_ext.integrations.megatron.metrics import MetricsWriter
from polycom_ext.runs.record import read_metrics


def test_a_step_keeps_its_first_evaluation_and_test_is_not_valid(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.add_scalar("lm loss", 5.0, 1)
    writer.add_scalar("lm loss", 4.0, 2)
    writer.flush()
    for value in (4.5, 9.0):  # in the loop, and once more after the last step
        writer.add_scalar("lm loss validation", value, 2)
        writer.flush()
    writer.split = "test"
    writer.add_scalar("lm loss validation", 4.6, 2)
    writer.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == [
        {"step": 1, "metrics": {"train/loss": 5.0}},
        {"step": 2, "metrics": {"train/loss": 4.0}},
        {"step": 2, "metrics": {"valid/loss": 4.5}},
        {"step": 2, "metrics": {"test/loss": 4.6}},
    ]


@pytest.mark.parametrize(
    ("resumed_from", "expected"),
    [
        (40, {30: 3.0, 35: 3.5, 40: 4.0}),  # trains nothing: evaluates once more, on other batches
        (30, {30: 3.0, 35: 0.35, 40: 0.4}),  # trains 31 to 40 anew
        (0, {30: 0.3, 35: 0.35, 40: 0.4}),  # starts anew
    ],
)
def test_a_process_that_goes_on_evaluates_anew_what_it_trains_anew_and_nothing_else(
    tmp_path: Path, resumed_from: int, expected: dict[int, float]
) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsWriter(path)
    first.begin_after(0)
    for step in (30, 35, 40):
        first.add_scalar("lm loss validation", step / 10, step)
    first.flush()  # and no close: it was killed
    path.write_text(path.read_text() + '{"step": 40, "metr\n')
    second = MetricsWriter(path)
    second.begin_after(resumed_from)
    for step in (30, 35, 40):
        if step > resumed_from:
            second.add_scalar("lm loss validation", step / 100, step)
            second.flush()
    second.add_scalar("lm loss validation", 0.4 if resumed_from < 40 else 9.0, 40)
    second.close()
    assert read_metrics(path).series["valid/loss"] == expected
