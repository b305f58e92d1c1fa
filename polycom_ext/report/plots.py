"""The figures of one family: curves, as figures.yaml names them, final values, what was learned."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from polycom_ext import activations, drawing
from polycom_ext.analysis import plots as studies
from polycom_ext.analysis.study import Study
from polycom_ext.display import printable
from polycom_ext.drawing import WIDTH, Look, Plot
from polycom_ext.evaluation import published
from polycom_ext.report import learned
from polycom_ext.report.families import Family, Group
from polycom_ext.report.learned import Having
from polycom_ext.report.results import Result
from polycom_ext.report.rundir import DAMAGE
from polycom_ext.report.tables import speedups
from polycom_ext.runs.record import Series

_DATA: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("figures.yaml").read_text(encoding="utf-8"))
FEW = 3
"""So many panels stand in a row, and the last one's curves are named at their ends; more have a legend."""


def draw(family: Family, folder: Path, problems: list[str]) -> list[Plot]:
    """Write the figures of a family as PNG files; those for which nothing was logged are left out.

    Adds to `problems` a sentence for each run whose record holds what cannot be drawn.
    """
    seen: set[tuple[str, ...]] = set()

    def sound(kept: str, figures: Callable[[Having, Path, str], list[Plot]], having: Having) -> list[Plot]:
        """The figures, without the runs of which none can be made."""
        try:
            return figures(having, folder, family.slug) if having else []
        except DAMAGE as error:
            left = [one for one in having if len(having) > 1 and sound(kept, figures, [one])]
            if 0 < len(left) < len(having):
                return sound(kept, figures, left)
            paths = ", ".join(str(one.path) for _, _, one in having)
            problem = f"{paths}: no figure can be made of its {kept}: {error}"
            problems.extend({problem}.difference(problems))
            return []

    with drawing.style():
        plots = [_curves(entry, family, seen, folder) for entry in _DATA["figures"]]
        plots.append(_finals(family, folder))
        drawn = partial(learned.draw, captions=_DATA["captions"])
        plots += sound("coefficients", drawn, _having(family, "coefficients"))
        plots += sound("analysis", _studied, _having(family, "analysis"))
    return [plot for plot in plots if plot]


def _having(family: Family, kept: str) -> Having:
    """Of each group the first run that has it."""
    having: dict[str, tuple[str, Look, Result]] = {}
    for group, one in [(each, one) for each in family.groups for one in each.results]:
        if (told := getattr(one, kept)) is not None and told.get("layers") != []:
            having.setdefault(group.label, (group.label, group.look, one))
    return list(having.values())


def _studied(having: Having, folder: Path, slug: str) -> list[Plot]:
    told = [(label, look, Study.from_json(one.analysis or {})) for label, look, one in having]
    return studies.draw(told, folder, slug)


def _curves(entry: dict[str, Any], family: Family, seen: set[tuple[str, ...]], folder: Path) -> Plot | None:
    """One of figures.yaml; None where it is of other runs, or shows nothing that was not yet seen."""
    wanted, x = {activations.parse(name) for name in entry.get("activations", ())}, entry.get("x", "tokens")
    groups = [one for one in family.groups if not wanted or (one.first.spec.entry, one.first.order) in wanted]
    if entry.get("kind", family.facts.kind) != family.facts.kind or len(groups) < len(wanted):
        return None
    names = sorted({name for group in groups for name in group.names})
    panels = [name for panel in entry["panels"] for name in fnmatch.filter(names, panel)]
    shown = {(panel, x, *(group.label for group in groups)) for panel in panels}
    untimed = x == "hours" and not all(len(one.hours) for group in groups for one in group.counted.values())
    if untimed or shown <= seen or ("needs" in entry and len(fnmatch.filter(names, entry["needs"])) < 2):
        return None
    seen |= shown
    few, outside = len(panels) <= FEW, False
    columns = len(panels) if few else 4
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 3.1 if few else 0.6 + 1.55 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    scale, axis = _axis(groups, x)
    for ax, panel in zip(grid, panels, strict=False):
        lines = {group.label: _line(ax, group, panel, x, scale) for group in groups}
        if not panel.startswith(("task/", "accuracy")) and (limits := drawing.cut(list(lines.values()))):
            ax.set_ylim(*limits)
            outside = True
        ax.set_title(_title(panel), loc="left", fontsize=8 if few else 7.5)
        drawing.count_steps(ax, 4 if columns > 2 else 5)
    drawing.name_axes(grid, columns, len(panels), axis)
    ends = [list(line.items())[-1] for line in lines.values() if line]
    texts, looks = [_annotated(group) for group in groups], [group.look for group in groups]
    if few and len(ends) == len(groups):
        named = [(*end, text, look) for end, text, look in zip(ends, texts, looks, strict=True)]
        drawing.label_ends(figure, ax, named)
    else:
        drawing.legend(figure, texts, looks)
    path = folder / f"{family.slug}-{entry['name']}.png"
    return drawing.save(figure, path, entry["title"], _caption(entry, family, groups, outside))


def _axis(groups: Sequence[Group], x: str) -> tuple[float, str]:
    """What the axis is scaled by, and its name."""
    if x == "tokens":
        return 1.0, _DATA["axes"]["tokens" if groups[0].first.facts.tokens(1) else "steps"]
    longest = max(one.hours.iloc[-1] for group in groups for one in group.counted.values())
    units = _DATA["axes"]["time"]
    scale, name = next((unit for unit in units if longest * unit[0] >= 2), units[-1])
    return scale, f"training time, {name}"


def _line(ax: Axes, group: Group, panel: str, x: str, scale: float) -> Series:
    """Draw a group's curve, its spread, a cross where it stops being finite; returns what is finite."""
    logged, color, train = group.frame(panel), group.look.color, panel == "train"
    places = group.along(logged.index, x) * scale
    finite = (drawing.smooth(logged)[0] if train else logged).replace([np.inf, -np.inf], np.nan)
    middle = finite.mean(axis=1, skipna=False)
    if train and logged.shape[1] == 1:
        ax.plot(places, logged.replace(np.inf, np.nan), color=color, alpha=0.16, linewidth=0.5)
    marker = "" if train else group.look.marker
    ax.plot(places, middle, color=color, linestyle=group.look.dashes, marker=marker, markersize=2.8)
    if logged.shape[1] > 1:
        spread = finite.std(axis=1)
        ax.fill_between(places, middle - spread, middle + spread, color=color, alpha=0.15, linewidth=0)
    broken = middle.isna().to_numpy()
    if train and broken.any() and (last := int(broken.argmax())):
        ax.plot(places[last - 1], middle.iloc[last - 1], "x", color=color, ms=7, mew=1.6)
    return {at: value for at, value in zip(places.tolist(), middle.tolist(), strict=True) if value == value}


def _title(panel: str) -> str:
    label = panel.partition("/")[2]
    title = printable(published.titles().get(label, label))
    return _DATA["labels"].get(panel) or (title if len(title) <= 30 else f"{title[:29]}…")


def _annotated(group: Group) -> str:
    unfinished = [f"to step {one.step}" for one in group.counted.values() if one.unfinished]
    return group.label + "".join(f" ({one})" for one in [*group.remarks, *unfinished][:1])


def _caption(entry: dict[str, Any], family: Family, groups: list[Group], outside: bool) -> str:
    windows = [drawing.smooth(one.frame("train"))[1] for one in groups if "train" in entry["panels"]]
    crosses = [f"{one.label} {said}" for one in groups for said in one.remarks if "finite" in said]
    found = {
        "of": entry.get("of"),
        "smoothed": max([0, *windows]) > 1 and max(windows),
        "several": any(len(one.counted) > 1 for one in groups),
        "outside": outside,
        "timed": "x" in entry,
        "untimely": "x" in entry and family.untimely,
        "crosses": ", ".join(crosses),
    }
    return " ".join(_DATA["captions"][name].format(value) for name, value in found.items() if value)


def _finals(family: Family, folder: Path) -> Plot | None:
    """Final validation losses and effective speedups, a point a seed; None where nothing compares."""
    losses = {one.label: one.final("validation") for one in family.groups}
    groups = [one for one in family.groups if len(losses[one.label]) and np.isfinite(losses[one.label]).all()]
    if len(groups) < 2:
        return None
    groups.sort(key=lambda one: losses[one.label].mean(), reverse=True)
    figure = Figure(figsize=(WIDTH, 0.8 + 0.24 * len(groups)), layout="constrained")
    panels = {"final validation loss": losses, "effective speedup": speedups(family, "tokens")}
    for ax, (title, values) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for place, group in enumerate(groups):
            points, color = values.get(group.label, pd.Series()).dropna(), group.look.color
            ax.plot(points, [place] * len(points), group.look.marker, color=color, alpha=0.55)
            if len(points) > 1:
                bars = {"xerr": points.std(), "fmt": "|", "color": color, "markersize": 9, "capsize": 2}
                ax.errorbar(points.mean(), place, **bars)
        ax.set_yticks(range(len(groups)), [group.label for group in groups])
        ax.set_title(title, loc="left")
    caption = _DATA["captions"]["finals"].format(family.baseline.label)
    path = folder / f"{family.slug}-final.png"
    return drawing.save(figure, path, "Final validation loss and speedup", caption)
