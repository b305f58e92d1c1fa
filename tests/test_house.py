"""What keeps the house in order: who may import whom, and where alone an upstream is known."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from polycom_ext import trainers

PACKAGE = Path(trainers.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
REGISTRY = PACKAGE / "trainers.py"
FLOORS = (
    ("_version", "errors"),
    ("arguments", "display", "files", "shipped", "trainers"),
    ("ops",),
    ("functional", "reference"),
    ("activations",),
    ("upstream",),
    ("data", "machine"),
    ("checkpoints",),
    ("runs",),
    ("drawing", "evaluation"),
    ("integrations", "doctor"),
    ("analysis", "planning"),
    ("report",),
    ("cli",),
)
"""From the ground up: a room imports those below its own floor, and itself. An adapter stands on the contract
that runs/ asks of it, and is found by name."""
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}
UPSTREAM_PACKAGES = ("megatron", "olmo", "megablocks", "transformer_engine")


def name(path: Path) -> str:
    """`runs.spec` for runs/spec.py, `runs` for runs/__init__.py, nothing for the package's own."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


NAMES = {name(path) for path in MODULES}


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if path.stem.endswith(
                "_polycom"
            ):  # saved beside a model's weights, where they find each other so
                assert node.level < 2
            else:
                assert not node.level, f"{path}:{node.lineno} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for full in names:
            inner = full.removeprefix("polycom_ext.")
            if inner != full:
                yield inner if inner in NAMES else inner.rpartition(".")[0]


def room(module: str) -> str:
    """The folder or file right under the package; an integration is a room of its own.

    The registry and the modules that it names are one.
    """
    first, *rest = module.split(".")
    if first == "integrations":
        return ".".join([first, *rest[:1]])
    return "activations" if first == "modules" else first


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_arrows_point_down(path: Path) -> None:
    here = name(path)
    for there in filter(None, imported(path)) if here else ():
        level, below = (LEVEL[room(module).split(".")[0]] for module in (here, there))
        assert room(there) == room(here) or below < level, f"{here} imports {there}"


def said(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every name and every string of a file, but for docstrings and argparse's help."""
    prose = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.add(node.value)
        elif isinstance(node, ast.keyword) and node.arg == "help":
            prose.update(inner for inner in ast.walk(node.value) if isinstance(inner, ast.Constant))
    for node in ast.walk(tree):
        for _, value in ast.iter_fields(node):
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str | bytes) and node not in prose:
                    yield getattr(node, "lineno", 0), str(text)


@pytest.mark.parametrize(
    "path", [path for path in MODULES if "integrations" not in path.parts and path != REGISTRY], ids=name
)
def test_an_upstream_is_known_in_its_room_alone(path: Path) -> None:
    known = [
        f"{path}:{line}: {text!r}"
        for line, text in said(path)
        if any(upstream in text.lower() for upstream in trainers.OURS)
    ]
    assert known == []
    assert not any(upstream in path.name for upstream in trainers.OURS)


@pytest.mark.parametrize("target", [*trainers.OURS.values(), *trainers.OUR_FORMATS.values()])
def test_an_adapter_is_imported_without_its_upstream_and_without_torch(target: str, tmp_path: Path) -> None:
    for package in (*UPSTREAM_PACKAGES, "torch"):
        (tmp_path / f"{package}.py").write_text(f"raise RuntimeError('{package} was imported')\n")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {target.partition(':')[0]}"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_files_are_replaced_and_locked_in_one_place() -> None:
    marks = ("os.replace", "fsync", "flock(", "NamedTemporaryFile")
    found = {name(path) for path in MODULES if any(mark in path.read_text() for mark in marks)}
    assert found == {"files"}


def test_what_make_starts_keeps_the_bytecode_that_it_compiles() -> None:
    """Without it each start compiles torch and an upstream anew, which takes longer than the imports."""
    told = subprocess.run(
        ["make", "--silent", "--eval", "said: ; @echo [$$PYTHONDONTWRITEBYTECODE]", "said"],
        cwd=PACKAGE.parent,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == "[]\n"


PAGE = PACKAGE.parent / "docs" / "architecture.md"


def test_the_page_on_architecture_names_every_room_and_its_floor() -> None:
    page = PAGE.read_text()
    named = {re.sub(r"/NAME/|\.py|/", "", name) for name in re.findall(r"`([\w./]+?)`", page)}
    assert {room for floor in FLOORS for room in floor if not room.startswith("_")} <= named
    block = re.search(r"\n\n((?:    .+\n)+)\nAn integration", page)
    assert block
    drawn = [{room.removesuffix("/NAME") for room in line.split(" · ")} for line in block[1].split("\n")[:-1]]
    floors = [{room.strip() for room in line} for line in drawn]
    shown = set.union(*floors)
    assert floors == [kept for floor in reversed(FLOORS) if (kept := {*floor} & shown)]
