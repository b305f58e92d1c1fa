"""More than 200 hostile strings through every backend."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..runs.hostile import strings
from ..runs.test_hostile import CASES, check, stand_in

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("of", [24, pytest.param(1, marks=pytest.mark.long)])
def test_each_string_is_refused_or_arrives_in_each_way_to_start_a_run(
    tmp_path: Path, case: str, of: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way renders all of them, and starts one in 24 (between them, each third), or each of them."""
    place = stand_in(tmp_path, monkeypatch)
    assert len(strings()) >= 200
    for number, text in enumerate(strings(), start=3 * list(CASES).index(case)):
        check(place, case, text, monkeypatch, starts=number % of == 0)
