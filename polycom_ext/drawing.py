"""What all figures share: colours by activation, type, labels at the ends of curves, smoothing, saving."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from polycom_ext import activations
from polycom_ext.runs.record import Series

_DATA: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
Dashes = Literal["-", "--", "-.", ":"]
_DASHES: tuple[Dashes, ...] = ("-", "--", "-.", ":")
WIDTH = 7.2
"""Inches: a text column."""


@dataclass(frozen=True)
class Plot:
    """A saved figure and what it shows."""

    path: Path
    title: str
    caption: str


@dataclass(frozen=True)
class Look:
    """How one run is drawn in all figures of its family."""

    color: str
    marker: str
    dashes: Dashes


@contextmanager
def style() -> Iterator[None]:
    """The type and line widths of every figure."""
    with matplotlib.rc_context(_DATA["style"]):
        yield


def looks(names: Sequence[str]) -> list[Look]:
    """How runs with these activations are drawn.

    Colour and marker by the activation, the same in every report; dashes tell runs of one apart.
    """
    ours = _DATA["activations"]
    others = [name for name in activations.names() if name not in ours]
    palette = {**ours, **dict(zip(others, cycle(_DATA["spare"]), strict=False))}
    drawn: dict[str, int] = {}
    made = []
    for name in names:
        color, marker = palette[name]
        made.append(Look(color, marker, _DASHES[drawn.get(name, 0) % len(_DASHES)]))
        drawn[name] = drawn.get(name, 0) + 1
    return made


def smooth(frame: Any) -> tuple[Any, int]:
    """Centred mean over a twentieth of the values (no lag); of what is not finite nothing is left.

    Args:
        frame: of pandas, a column a curve.

    Returns the smoothed curves and the number of values in a mean.
    """
    window = max(1, len(frame) // 20) | 1
    finite = frame.where(abs(frame) < math.inf)
    return finite.rolling(window, center=True, min_periods=1).mean().where(finite.notna()), window


def cut(curves: Sequence[Series]) -> tuple[float, float] | None:
    """Limits of y that show the curves from a tenth of the way on: their first descent hides all differences.

    None where that leaves nothing out, or there is nothing to show.
    """
    steps = [step for series in curves for step in series]
    shown: list[float] = []
    everything: list[float] = []
    for series in curves:
        finite = [(step, value) for step, value in series.items() if math.isfinite(value)]
        everything += [value for _, value in finite]
        shown += [value for step, value in finite if step >= max(steps) / 10]
    if not shown:
        return None
    starts = [next((v for v in series.values() if math.isfinite(v)), -math.inf) for series in curves]
    low, high = min(shown), min(max(shown), max(starts))
    if high >= max(everything) or high <= low:
        return None
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def spread(targets: Sequence[float], gap: float) -> list[float]:
    """Positions near the ascending targets, at least `gap` apart, and within [0, 1] where they fit."""
    blocks: list[list[float]] = []  # [sum of shifted targets, members]; overlapping blocks are averaged
    for index, target in enumerate(targets):
        blocks.append([target - index * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, members = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += members
    ceiling = max(0.0, 1 - (len(targets) - 1) * gap)
    shifted = [
        min(max(total / members, 0.0), ceiling) for total, members in blocks for _ in range(int(members))
    ]
    return [value + index * gap for index, value in enumerate(shifted)]


def label_ends(figure: Figure, ax: Axes, ends: Sequence[tuple[float, float, str, Look]]) -> None:
    """Write the text of each (x, y, text, look) beside the right edge, joined to (x, y) by a thin line."""
    if not ends:
        return
    figure.draw_without_rendering()  # fixes the size of the axes and their limits
    gap = 1.25 * matplotlib.rcParams["font.size"] / 72 * figure.dpi / ax.bbox.height
    fractions = [ax.transAxes.inverted().transform(ax.transData.transform((x, y)))[1] for x, y, _, _ in ends]
    order = sorted(range(len(ends)), key=lambda index: fractions[index])
    places = spread([min(max(fractions[index], 0.0), 1.0) for index in order], gap)
    for index, place in zip(order, places, strict=True):
        x, y, text, look = ends[index]
        ax.annotate(
            text,
            xy=(x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=look.color,
            va="center",
            annotation_clip=False,
            # To the middle of its left edge: to its own, the default, it would cross the labels between.
            arrowprops={
                **{"arrowstyle": "-", "color": look.color, "linewidth": 0.5, "alpha": 0.6, "shrinkB": 2},
                "relpos": (0, 0.5),
            },
        )


def count_steps(ax: Axes, ticks: int) -> None:
    """Round numbers of training steps along x."""
    ax.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=[1, 2, 2.5, 5, 10]))


def name_axes(panels: Sequence[Axes], columns: int, used: int, xlabel: str) -> None:
    """Name x below the lowest panel of each column of a grid, and hide the panels that are not used."""
    for index, ax in enumerate(panels):
        if index >= used:
            ax.set_axis_off()
        elif index + columns >= used:
            ax.set_xlabel(xlabel)
            ax.tick_params(labelbottom=True)


def legend(
    figure: Figure, labels: Sequence[str], drawn: Sequence[Look], extra: Sequence[Line2D] = ()
) -> None:
    """One legend for the whole figure, below its axes."""
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, linestyle=look.dashes, label=label)
        for label, look in zip(labels, drawn, strict=True)
    ]
    handles += extra
    column = 0.6 + 0.07 * max(map(len, labels))  # inches, roughly
    figure.legend(
        handles=handles, loc="outside lower center", ncols=max(1, min(len(handles), int(WIDTH / column)))
    )


def save(figure: Figure, path: Path, title: str, caption: str) -> Plot:
    """Write the PNG."""
    figure.savefig(path)
    return Plot(path, title, caption)
