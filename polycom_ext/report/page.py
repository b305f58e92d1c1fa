"""The report itself: numbers, figures and page put together."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

import jinja2
import pandas as pd

from polycom_ext import activations
from polycom_ext._version import __version__
from polycom_ext.errors import PolycomError
from polycom_ext.report import rundir, tables
from polycom_ext.report.families import Family, families, flatten
from polycom_ext.report.plots import draw
from polycom_ext.report.results import FINAL_SHARE, Result
from polycom_ext.report.sentence import summarize
from polycom_ext.runs import document


def write_report(run_dirs: Sequence[Path], output: Path, title: str) -> tuple[Path, str]:
    """Write index.html, the plots, results.csv and groups.csv into `output`.

    Runs that cannot be read are left out, and the page says so. Returns its path and the sentence on what it
    shows. Raises PolycomError, with nothing written, where no run is left.
    """
    results, problems = [], []
    for path in dict.fromkeys(path.resolve() for path in run_dirs):
        try:
            results.append(Result.of(rundir.read(path)))
        except rundir.DAMAGE as error:
            problems.append(str(error) if isinstance(error, PolycomError) else f"{path} is no run: {error!r}")
    if not results:
        raise PolycomError("; ".join(problems))
    if output.exists() and not output.is_dir():
        raise PolycomError(f"the report cannot go to {output}: it is a file, not a folder")
    found = families(results)
    sentence = summarize(found)
    if problems:
        sentence += f" Not shown: {len(problems)} of {len(problems) + len(results)} runs."
    problems += [problem for one in results for problem in one.run.problems]
    output.mkdir(parents=True, exist_ok=True)
    sections = [_section(family, output, problems) for family in found]
    tables.write_csv(found, output)
    page, text = output / "index.html", _render(title, sentence, sections, problems)
    page.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files need not be UTF-8
    return page, sentence


def _section(family: Family, output: Path, problems: list[str]) -> dict[str, Any]:
    """What stands on the page of a family; adds to `problems` what cannot be drawn."""
    facts = {name: getattr(family.facts, name, None) for name in (*family.published.conditions, "batch")}
    plots, damaged = draw(family, output)
    problems += damaged
    clocks = ["tokens"] if family.untimely else ["tokens", "hours"]
    return {
        "family": family,
        "seeds": max(len(group.counted) for group in family.groups),
        "here": {**facts, "tokens": family.tokens, "data": _names(family.facts.data)},
        "differences": tables.differences(family),
        "unmatched": [one.label for one in family.groups if not one.seeds & family.baseline.seeds],
        "speedups": {clock: tables.speedups(family, clock) for clock in clocks},
        "losses": tables.scores(family, "text"),
        "accuracies": tables.scores(family, "task"),
        "evaluation": tables.conditions(family),
        "plots": plots,
    }


def _names(files: Sequence[str]) -> str:
    """The files with the folder that each lies in."""
    names = list(dict.fromkeys("/".join(PurePath(file).parts[-2:]) for file in files))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _versions(results: Sequence[Result]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Versions and patch states that all runs share, and for each run those that differ."""
    flat = [flatten(result.run.versions, " ").items() for result in results]
    told = [
        {key: ", ".join(map(str, one)) if isinstance(one, list) else str(one) for key, one in of}
        for of in flat
    ]
    shared = dict(set.intersection(*(set(one.items()) for one in told)))
    keys = [key for key in told[0] if key in shared]
    return {key: shared[key] for key in keys}, [
        {key: one[key] for key in one if key not in shared} for one in told
    ]


def _render(title: str, sentence: str, sections: list[dict[str, Any]], problems: list[str]) -> str:
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
        "spread": _spread,
        "embed": lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii"),
        "yaml": lambda value: document.dump(value).strip(),
    }
    results = [result for section in sections for result in section["family"].results]
    shared, individual = _versions(results)
    kinds = {section["family"].facts.kind: section["family"].published for section in sections}
    return environment.get_template("page.html.j2").render(
        title=title,
        rehearsal=any(section["family"].rehearsal for section in sections),
        sentence=sentence,
        problems=problems,
        sections=sections,
        published=list(kinds.values()),
        titles={name: activations.find(name).title for name in activations.names()},
        runs=list(zip(results, individual, strict=True)),
        shared_versions=shared,
        final_share=FINAL_SHARE,
        of=tables.of,
        date=datetime.now(),
        version=__version__,
    )


def _number(value: float | None, digits: int = 2, sign: str = "") -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:{sign}.{digits}f}".replace("-", "−") if math.isfinite(value) else "not finite"


def _spread(values: pd.Series, digits: int, sign: str = "") -> str:
    """The mean of the seeds ± their sample standard deviation."""
    mean = _number(values.mean(), digits, sign)
    return mean if len(values) < 2 or mean == "not finite" else f"{mean} ± {values.std():.{digits}f}"


def _count(value: Any) -> str:
    """250000000000 -> 250 B, 819200 -> 0.82 M, 8256 -> 8256; text as it is."""
    if not isinstance(value, int):
        return "–" if value in (None, "") else str(value)
    for size, unit in ((10**9, "B"), (10**5, "M")):
        if value >= size:
            return f"{value / max(size, 10**6):.3g} {unit}"
    return str(value)
