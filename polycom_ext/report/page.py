"""The report itself: numbers, figures and page put together."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

import jinja2

from polycom_ext import activations
from polycom_ext._version import __version__
from polycom_ext.drawing import Plot
from polycom_ext.errors import PolycomError
from polycom_ext.report import rundir, tables
from polycom_ext.report.plots import draw
from polycom_ext.report.results import FINAL_SHARE, Family, Result, families
from polycom_ext.report.sentence import summarize
from polycom_ext.runs import document

LABEL = "rehearsal: does not reproduce the paper"
CONDITIONS = {
    "layers": "Layers",
    "hidden": "Hidden size",
    "heads": "Attention heads",
    "ffn_width": "FFN width, ungated",
    "experts": "Routed experts",
    "active_experts": "Active experts",
    "sequence": "Sequence, tokens",
    "batch": "Batch, sequences",
    "tokens": "Training tokens",
    "data": "Training data",
}
"""Field of Facts, or of published conditions -> what the page calls it."""


@dataclass(frozen=True)
class Section:
    """One family on the page."""

    family: Family
    conditions: list[tuple[str, Any, Any]]
    """(name, here, in the paper)"""
    differences: tables.Differences | None
    losses: tables.SideBySide | None
    accuracies: tables.SideBySide | None
    evaluation: str
    """What `polycom eval` measured on."""
    plots: list[Plot]


def write_report(run_dirs: Sequence[Path], output: Path, title: str) -> tuple[Path, str]:
    """Write index.html, the plots and results.csv into `output`.

    Returns the page's path and the sentence on what it shows. Raises PolycomError, with nothing written,
    where a directory is no run or its run logged nothing.
    """
    found = families([rundir.read(path) for path in dict.fromkeys(path.resolve() for path in run_dirs)])
    sentence = summarize(found)
    if output.exists() and not output.is_dir():
        raise PolycomError(f"the report cannot go to {output}: it is a file, not a folder")
    output.mkdir(parents=True, exist_ok=True)
    sections = [
        Section(
            family=family,
            conditions=_conditions(family),
            differences=tables.differences(family),
            losses=tables.side_by_side(family, "loss"),
            accuracies=tables.side_by_side(family, "accuracy"),
            evaluation=tables.conditions(family),
            plots=draw(family, output),
        )
        for family in found
    ]
    tables.write_csv(found, output / "results.csv")
    page = output / "index.html"
    # Names of files need not be UTF-8.
    page.write_text(_render(title, sentence, sections), encoding="utf-8", errors="backslashreplace")
    return page, sentence


def _conditions(family: Family) -> list[tuple[str, Any, Any]]:
    here: dict[str, Any] = {name: getattr(family.facts, name, None) for name in CONDITIONS}
    here |= {"tokens": family.tokens, "data": _names(family.facts.data)}
    paper = family.published.conditions
    return [
        (title, here[name], paper.get(name))
        for name, title in CONDITIONS.items()
        if here[name] or paper.get(name)
    ]


def _names(files: Sequence[str]) -> str:
    """The files with the folder that each lies in."""
    names = list(dict.fromkeys("/".join(PurePath(file).parts[-2:]) for file in files))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _versions(results: Sequence[Result]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Versions and patch states that all runs share, and for each run those that differ."""
    flat = [_flatten(result.run.versions) for result in results]
    shared = {key: value for key, value in flat[0].items() if all(one.get(key) == value for one in flat)}
    return shared, [{key: value for key, value in one.items() if key not in shared} for one in flat]


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        flat: dict[str, str] = {}
        for key, below in value.items():
            flat |= _flatten(below, f"{prefix}{key} ")
        return flat
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return {prefix.strip(): text} if value not in (None, [], "") else {}


def _render(title: str, sentence: str, sections: list[Section]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("polycom_ext.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": _number,
        "count": _count,
        "signed": _signed,
        "embed": _embed,
        "yaml": lambda value: document.dump(value).strip(),
    }
    results = [result for section in sections for result in section.family.results]
    shared, individual = _versions(results)
    rehearsal = any(section.family.rehearsal for section in sections)
    return environment.get_template("page.html.j2").render(
        title=title,
        label=LABEL if rehearsal else "",
        sentence=sentence,
        sections=sections,
        published=list(
            {section.family.facts.kind: section.family.published for section in sections}.values()
        ),
        titles={name: activations.find(name).title for name in activations.names()},
        runs=list(zip(results, individual, strict=True)),
        shared_versions=shared,
        final_share=FINAL_SHARE,
        date=datetime.now(),
        version=__version__,
    )


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def _count(value: Any) -> str:
    """250000000000 -> 250 B, 819200 -> 0.82 M, 8256 -> 8256; text as it is."""
    if value is None or value == "":
        return "–"
    if not isinstance(value, int):
        return str(value)
    for size, unit in ((10**9, "B"), (10**5, "M")):
        if value >= size:
            return f"{value / max(size, 10**6):.3g} {unit}"
    return str(value)


def _signed(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value:+.{digits}f}".replace("-", "−") if math.isfinite(value) else "not finite"


def _embed(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
