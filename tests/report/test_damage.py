"""Damaged records: whatever is in a run's files, a report of it ends with 0, or with 2 and a sentence."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from polycom_ext import cli
from polycom_ext.analysis.study import Activity, Layer, Study

from .conftest import DENSE, MOE, RunMaker, coefficients, metrics

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 3.5, 10**400, -(10**30), math.nan, math.inf, "", "x", "<b>&", "\ud800", "\x00\n"),
    *([], {}, [None], [[]], {"a": 1}, {"layers": 3}, [1, "x"]),
)
"""What may stand where something else should."""


def whole(make_run: RunMaker, name: str, activation: str, **more: Any) -> Path:
    """A run with every file that a report reads."""
    logged = metrics(4.3, labels=("c4_en-validation", "own"), tasks=("piqa", "openbook_qa"))
    run = make_run(name, activation, logged, learned=coefficients(activation), **more)
    sight: Any = {name: [0.1, 0.2] for name in Activity.__dataclass_fields__}
    layers = [Layer({"up": [100.0], "down": [90.0]}, {"a₁": 0.3}, None) for _ in range(2)]
    study = Study("somewhere", activation, {"up": 192, "down": 192}, layers, Activity(**sight)).as_json()
    study["activity"] |= {"tokens": 64, "similarity": [[1.0, 0.5], [0.5, 1.0]], "shapes": [None, None]}
    (run / "analysis.json").write_text(json.dumps(study))
    settings = {"data": "hub", "limit": 20, "num_fewshot": None, "lm_eval": "0.4.13"}
    task = {"settings": settings, "results": {"results": {"piqa": {"acc_norm,none": 0.5}}}}
    folder = run / "evaluations" / "iter_400"
    folder.mkdir(parents=True)
    told = {"step": 400, "tasks": {"piqa": task}, "tokens": {"own": {"settings": {}, "loss": 2.5}}}
    (folder / "results.json").write_text(json.dumps(told))
    return run


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a document."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def damaged(content: str, chance: random.Random) -> bytes:
    """A file torn, filled with something else, or a document with another value somewhere."""
    data = content.encode("utf-8", "surrogatepass") or b"{}"
    at = chance.randrange(len(data))
    way = chance.randrange(5)
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:at] + chance.randbytes(chance.randrange(1, 40)) + data[at:]
    if way == 2:
        lines = content.splitlines()
        lines.insert(chance.randrange(len(lines) + 1), json.dumps(chance.choice(VALUES)))
        return "\n".join(lines).encode()
    lines = content.splitlines() if content.count("\n{") else [content]  # a document a line, or one
    for _ in range(chance.choice((1, 1, 5))):
        at = chance.randrange(len(lines))
        try:
            document = json.loads(lines[at])
            inside = [] if isinstance(document, str) else list(places(document))
            container, key = chance.choice(inside)
        except (ValueError, AttributeError, TypeError, IndexError):
            return data[: at + 1]
        if isinstance(container, dict) and chance.random() < 0.3:
            container[str(chance.choice(VALUES))] = container.pop(key)
        else:
            container[key] = chance.choice(VALUES)
        lines[at] = json.dumps(document)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def harm(run: Path, chance: random.Random) -> str:
    """Damage one file of a run, or take it away; says what."""
    path = chance.choice(sorted(path for path in run.rglob("*") if path.is_file()))
    before = path.read_text(errors="replace")
    if chance.random() < 0.1:
        path.unlink()
        if chance.random() < 0.5:
            path.mkdir()
        return f"{path}: gone"
    path.write_bytes(damaged(before, chance))
    return f"{path}: {path.read_bytes()[:2000]!r}"


class Page(HTMLParser):
    """What a browser would load, run or show as an element of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loaded += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "data", "style")
        ]
        assert not [name for name, _ in attributes if name.startswith("on")]


def check(runs: list[Path], output: Path, capsys: pytest.CaptureFixture[str], said: str) -> int:
    status = cli.main(["report", *map(str, runs), "--output", str(output)])
    error = capsys.readouterr().err
    assert status in (0, 2), said
    assert "Traceback" not in error, said
    if status:
        assert error.startswith("polycom report: "), said
        assert not output.exists(), said
    else:
        page = Page()
        page.feed((output / "index.html").read_text())
        assert all(source.startswith("data:image/png;base64,") for source in page.loaded), said
        assert not page.tags & {"script", "b1", "iframe", "object", "link"}, said
    return status


def test_damaged_runs_stand_in_one_report_with_whole_ones(
    make_run: RunMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, said = [whole(make_run, "whole", "swiglu"), whole(make_run, "other", "polynorm")], []
    for seed in range(16):
        options = {**(MOE if seed % 2 else DENSE), "seed": seed}
        run = whole(make_run, f"torn-{seed}", "polynorm", options=options)
        said.append(harm(run, random.Random(seed)))
        runs.append(run)
    assert check(runs, tmp_path / "report", capsys, "\n".join(said)) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "SwiGLU" in page
    assert re.search(r"Left out: \d", page)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(300))
def test_a_damaged_run_is_reported_or_refused_in_a_sentence(
    seed: int, make_run: RunMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(seed)
    run = whole(make_run, "run", chance.choice(("polynorm", "swiglu")))
    said = "\n".join(harm(run, chance) for _ in range(chance.choice((1, 1, 2, 4))) if any(run.rglob("*.*")))
    check([run], tmp_path / "report", capsys, said)
