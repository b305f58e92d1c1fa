"""The report itself: numbers, figures and page put together."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

import jinja2
import pandas as pd

from polycom_ext import activations
from polycom_ext._version import __version__
from polycom_ext.drawing import Plot
from polycom_ext.errors import PolycomError
from polycom_ext.report import rundir, tables
from polycom_ext.report.families import Family, families
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
            results.append(rundir.read(path))
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
    problems += [problem for one in results for problem in one.problems]
    output.mkdir(parents=True, exist_ok=True)
    plots = {family.slug: draw(family, output, problems) for family in found}
    tables.write_csv(found, output)
    page, text = output / "index.html", _render(title, sentence, found, plots, problems)
    page.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files need not be UTF-8
    return page, sentence


def _versions(results: Sequence[Result]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Versions and patch states that all runs share, and for each run those that differ."""
    flat = [document.flat(one.versions, " ").items() for one in results]
    told = pd.DataFrame([{name: _text(value) for name, value in of} for of in flat])
    shared = told.nunique(dropna=False) == 1
    individual = [one.dropna().to_dict() for _, one in told.loc[:, ~shared].iterrows()]
    return told.loc[0, shared].to_dict(), individual


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _render(
    title: str, sentence: str, found: Sequence[Family], plots: dict[str, list[Plot]], problems: list[str]
) -> str:
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
        "files": _files,
        "fields": asdict,
    }
    results = [result for family in found for result in family.results]
    shared, individual = _versions(results)
    return environment.get_template("page.html.j2").render(
        title=title,
        sentence=sentence,
        problems=problems,
        families=found,
        plots=plots,
        tables=tables,
        published=list({family.facts.kind: family.published for family in found}.values()),
        titles={name: activations.find(name).title for name in activations.names()},
        runs=list(zip(results, individual, strict=True)),
        shared_versions=shared,
        final_share=FINAL_SHARE,
        date=datetime.now(),
        version=__version__,
    )


def _files(files: Sequence[str]) -> str:
    """With the folder that each lies in."""
    names = list(dict.fromkeys("/".join(PurePath(file).parts[-2:]) for file in files))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _number(value: float | None, digits: int = 2, sign: str = "") -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:{sign}.{digits}f}".replace("-", "−") if math.isfinite(value) else "not finite"


def _spread(values: pd.Series | None, digits: int, sign: str = "") -> str:
    """The mean of the seeds that have a value ± their sample standard deviation."""
    values = pd.Series(values, dtype=float).dropna()
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
