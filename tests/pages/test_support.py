"""README's table of what was tried says what the tests say: it is made from docs/support.toml."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOP = Path(__file__).parents[2]
SUPPORT: dict[str, Any] = tomllib.loads((TOP / "docs" / "support.toml").read_text())
COLUMNS: dict[str, str] = SUPPORT["columns"]
CELLS = {
    f"{row['title']}, {COLUMNS[column]}": row[column]
    for row in SUPPORT["rows"]
    for column in COLUMNS
    if row.get(column)
}
NOT_RUN = "–"


@pytest.fixture(scope="module")
def collected() -> str:
    """The ids of the tests in the files that cells name, a line each."""
    files = sorted({test.partition("::")[0] for tests in CELLS.values() for test in tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    options = ["-o", "addopts=--import-mode=importlib --strict-markers"]
    told = subprocess.run([*command, *options, *files], cwd=TOP, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout[-2000:] + told.stderr[-2000:]
    return told.stdout


def pattern(test: str) -> str:
    return "^" + ".*".join(re.escape(part) for part in test.split("*")) + "$"


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_names_tests_that_are_there(cell: str, collected: str) -> None:
    gone = [test for test in CELLS[cell] if not re.search(pattern(test), collected, re.MULTILINE)]
    assert gone == []


def status(tests: list[str] | None) -> str:
    """What a cell says: one word, that of all its tests."""
    if not tests:
        return "" if tests is None else NOT_RUN
    means: dict[str, str] = SUPPORT["means"]
    [word] = {means[max(filter(test.startswith, means), key=len)] for test in tests}
    return word


def table() -> str:
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in SUPPORT["rows"]:
        assert row.keys() <= {"title", *COLUMNS}
        lines.append(
            "| " + " | ".join([row["title"], *(status(row.get(column)) for column in COLUMNS)]) + " |"
        )
    return re.sub(" +", " ", "\n".join(lines)) + "\n"


def test_readme_holds_the_table() -> None:
    assert table() in (TOP / "README.md").read_text(), f"README must hold\n\n{table()}"
