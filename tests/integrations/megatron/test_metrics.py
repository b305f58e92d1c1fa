"""What Megatron tells its TensorBoard writer is in metrics.jsonl, a line a step."""

import json
from pathlib import Path

from polycom_ext.integrations.megatron.metrics import MetricsWriter


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
