"""The figures of one family: curves, as figures.yaml names them, final values, what was learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from polycom_ext.report.families import Family, Group
from polycom_ext.report.learned import coefficient_plot, shape_plot
from polycom_ext.report.results import Result
from polycom_ext.report.rundir import DAMAGE
from polycom_ext.report.tables import speedups
from polycom_ext.runs.record import Series

_DATA: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("figures.yaml").read_text(encoding="utf-8"))
FEW = 3
"""So many panels stand in a row, and the last one's curves are named at their ends; more have a legend."""

Drawn = list[tuple[Group, Look]]
Having = list[tuple[str, Look, Result]]


def draw(family: Family, folder: Path) -> tuple[list[Plot], list[str]]:
    """Write the figures of a family as PNG files; those for which nothing was logged are left out.

    Returns them, and a sentence for each run whose record holds what cannot be drawn.
    """
    looks = drawing.looks([group.first.spec.entry.name for group in family.groups])
    drawn = list(zip(family.groups, looks, strict=True))
    seen: set[tuple[str, ...]] = set()
    problems: list[str] = []

    def sound(figure: Callable[[Having], list[Plot]], having: Having, kept: str) -> list[Plot]:
        """The figures, without the runs of which none can be made."""
        try:
            return figure(having) if having else []
        except DAMAGE as error:
            left = [one for one in having if len(having) > 1 and sound(figure, [one], kept)]
            if 0 < len(left) < len(having):
                return sound(figure, left, kept)
            paths = ", ".join(str(one.run.path) for _, _, one in having)
            problems.append(f"{paths}: no figure can be made of its {kept}: {error}")
            return []

    def first(kept: str) -> Having:
        """Of each group the first run that has it."""
        having: dict[str, tuple[str, Look, Result]] = {}
        for group, look in drawn:
            for one in group.results:
                if (told := getattr(one.run, kept)) is not None and told.get("layers") != []:
                    having.setdefault(group.label, (group.label, look, one))
        return list(having.values())

    def learned(having: Having) -> list[Plot]:
        paths = (folder / f"{family.slug}-{name}.png" for name in ("coefficients", "shapes"))
        return [coefficient_plot(having, next(paths)), shape_plot(having, next(paths))]

    def studied(having: Having) -> list[Plot]:
        told = [(label, look, Study.from_json(one.run.analysis or {})) for label, look, one in having]
        return studies.draw(told, folder, family.slug)

    with drawing.style():
        plots = [_curves(entry, family, drawn, seen, folder) for entry in _DATA["figures"]]
        plots += [_finals(family, drawn, folder), *sound(learned, first("coefficients"), "coefficients")]
        plots += sound(studied, first("analysis"), "analysis")
    return [plot for plot in plots if plot], list(dict.fromkeys(problems))


def _curves(
    entry: dict[str, Any], family: Family, drawn: Drawn, seen: set[tuple[str, ...]], folder: Path
) -> Plot | None:
    """One of figures.yaml; None where it is of other runs, or shows nothing that was not yet seen."""
    wanted = {activations.parse(name) for name in entry.get("activations", ())}
    chosen = [one for one in drawn if not wanted or activations.parse(one[0].first.spec.activation) in wanted]
    groups, x = [group for group, _ in chosen], entry.get("x", "tokens")
    if entry.get("kind", family.facts.kind) != family.facts.kind or len(chosen) < len(wanted):
        return None
    names = list(dict.fromkeys(name for group in groups for one in group.counted for name in one.curves))
    every = {many: sorted(one for one in names if one[:5] == f"{many[:4]}/") for many in ("texts", "tasks")}
    panels = [one for panel in entry["panels"] for one in every.get(panel, [panel]) if one in names]
    shown = {(panel, x, *(group.label for group in groups)) for panel in panels}
    untimed = x == "hours" and not all(len(one.hours) for group in groups for one in group.counted)
    if untimed or shown <= seen or ("needs" in entry and len(every[entry["needs"]]) < 2):
        return None
    seen |= shown
    few = len(panels) <= FEW
    columns = len(panels) if few else 4
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 3.1 if few else 0.6 + 1.55 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    scale, axis = _axis(groups, x)
    lines: dict[str, dict[str, Series]] = {panel: {} for panel in panels}
    window, outside = 1, False
    for ax, panel in zip(grid, panels, strict=False):
        for group, look in chosen:
            smoothed = drawing.smooth(group.frame(panel)) if panel == "train" else (group.frame(panel), 1)
            window = max(window, smoothed[1])
            places = group.along(smoothed[0].index, x) * scale
            lines[panel][group.label] = _line(ax, group, look, panel, places, smoothed[0])
        limits = None if "task" in panel or panel == "accuracy" else drawing.cut(list(lines[panel].values()))
        if limits:
            ax.set_ylim(*limits)
            outside = True
        ax.set_title(_DATA["labels"].get(panel) or _title(panel), loc="left", fontsize=8 if few else 7.5)
        drawing.count_steps(ax, 4 if columns > 2 else 5)
    drawing.name_axes(grid, columns, len(panels), axis)
    ends = {label: list(line.items())[-1] for label, line in lines[panels[-1]].items() if line}
    if few and len(ends) == len(chosen):
        named = [(*ends[group.label], _annotated(group), look) for group, look in chosen]
        drawing.label_ends(figure, grid[len(panels) - 1], named)
    else:
        drawing.legend(figure, [_annotated(group) for group in groups], [look for _, look in chosen])
    path = folder / f"{family.slug}-{entry['name']}.png"
    return drawing.save(figure, path, entry["title"], _caption(entry, family, groups, window, outside))


def _axis(groups: Sequence[Group], x: str) -> tuple[float, str]:
    """What the axis is scaled by, and its name."""
    facts = groups[0].first.facts
    if x == "tokens":
        return 1.0, _DATA["axes"]["tokens" if facts.tokens(1) else "steps"]
    longest = max(one.hours.iloc[-1] for group in groups for one in group.counted)
    units = _DATA["axes"]["time"]
    scale, name = next((unit for unit in units if longest * unit[0] >= 2), units[-1])
    return scale, f"training time, {name}"


def _line(ax: Axes, group: Group, look: Look, panel: str, places: np.ndarray, frame: pd.DataFrame) -> Series:
    """Draw a group's curve, its spread, a cross where it stops being finite; returns what is finite."""
    finite = frame.replace([np.inf, -np.inf], np.nan)
    middle = finite.mean(axis=1, skipna=False)
    if panel == "train" and frame.shape[1] == 1:
        logged = group.frame(panel).iloc[:, 0].replace(np.inf, np.nan)
        ax.plot(places, logged, color=look.color, alpha=0.16, linewidth=0.5)
    marker = "" if panel == "train" else look.marker
    ax.plot(places, middle, color=look.color, linestyle=look.dashes, marker=marker, markersize=2.8)
    if frame.shape[1] > 1:
        spread = finite.std(axis=1)
        ax.fill_between(places, middle - spread, middle + spread, color=look.color, alpha=0.15, linewidth=0)
    broken = middle.isna().to_numpy()
    if panel == "train" and broken.any() and (last := int(broken.argmax())):
        ax.plot(places[last - 1], middle.iloc[last - 1], "x", color=look.color, ms=7, mew=1.6)
    return {at: value for at, value in zip(places.tolist(), middle.tolist(), strict=True) if value == value}


def _title(panel: str) -> str:
    label = panel.partition("/")[2]
    title = printable(published.titles().get(label, label))
    return title if len(title) <= 30 else f"{title[:29]}…"


def _annotated(group: Group) -> str:
    said = [*group.remarks, *(f"to step {one.run.step}" for one in group.counted if one.unfinished)]
    return group.label + "".join(f" ({one})" for one in said[:1])


def _caption(entry: dict[str, Any], family: Family, groups: list[Group], window: int, outside: bool) -> str:
    crosses = [f"{one.label} {said}" for one in groups for said in one.remarks if "finite" in said]
    found = {
        "of": entry.get("of"),
        "smoothed": window > 1 and window,
        "several": any(len(one.counted) > 1 for one in groups),
        "outside": outside,
        "timed": "x" in entry,
        "untimely": "x" in entry and family.untimely,
        "crosses": ", ".join(crosses),
    }
    return " ".join(_DATA["captions"][name].format(value) for name, value in found.items() if value)


def _finals(family: Family, drawn: Drawn, folder: Path) -> Plot | None:
    """Final validation losses and effective speedups, a point a seed; None where nothing compares."""
    losses = {group.label: group.final("validation") for group in family.groups}
    losses = {label: values for label, values in losses.items() if len(values) and np.isfinite(values).all()}
    if len(losses) < 2:
        return None
    places = {label: place for place, label in enumerate(sorted(losses, key=lambda one: -losses[one].mean()))}
    columns = {"final validation loss": losses, "effective speedup": speedups(family, "tokens")}
    figure = Figure(figsize=(WIDTH, 0.8 + 0.24 * len(losses)), layout="constrained")
    for ax, (title, values) in zip(figure.subplots(1, 2, sharey=True), columns.items(), strict=True):
        for group, look in drawn:
            points = values[group.label].dropna() if group.label in values.keys() & places else pd.Series()
            place = places.get(group.label, 0)
            ax.plot(points, [place] * len(points), look.marker, color=look.color, alpha=0.55)
            if len(points) > 1:
                bar = {"fmt": "|", "color": look.color, "markersize": 9, "capsize": 2}
                ax.errorbar(points.mean(), place, xerr=points.std(), **bar)
        ax.set_yticks(list(places.values()), list(places))
        ax.set_title(title, loc="left")
    caption = _DATA["captions"]["finals"].format(family.baseline.label)
    return drawing.save(
        figure, folder / f"{family.slug}-final.png", "Final validation loss and speedup", caption
    )
