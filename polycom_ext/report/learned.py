"""Figures of what the activations learned: their coefficients and their shape, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from polycom_ext import activations
from polycom_ext.drawing import WIDTH, Look, Plot, legend, name_axes, save
from polycom_ext.errors import PolycomError
from polycom_ext.modules import coefficients
from polycom_ext.report.results import Result
from polycom_ext.runs.record import Record, mean, parameters

Learned = Sequence[tuple[str, Look, Result]]
"""(label, look, run)"""
RANGE = 3.0
"""The shapes are drawn for x from -RANGE to RANGE."""
DEFAULT_ROW = 4096
"""Length of the standard-normal row where the spec gives no FFN width."""


def by_layer(result: Result) -> list[tuple[int, dict[str, float]]]:
    """(layer, {title: value of each coefficient}) for each entry of coefficients.json.

    Experts with coefficients of their own give several entries a layer.
    """
    entries = []
    for position, layer in enumerate((result.run.coefficients or {})["layers"]):
        number = re.search(r"\.(\d+)(\.|$)", layer["name"])
        entries.append((int(number[1]) if number else position, coefficients(_module(result, layer))))
    return entries


def coefficient_plot(learned: Learned, path: Path) -> Plot:
    """One panel a coefficient, over the layers; the initial value as a dotted line."""
    names = sorted({name for _, _, result in learned for _, values in by_layer(result) for name in values})
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(WIDTH, 0.7 + 1.7 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    several = False
    for ax, name in zip(panels, names, strict=False):
        for _, look, result in learned:
            points = [(layer, values[name]) for layer, values in by_layer(result) if name in values]
            if not points:
                continue
            layers = sorted({layer for layer, _ in points})
            means = [mean([value for at, value in points if at == layer]) for layer in layers]
            ax.axhline(coefficients(_module(result))[name], color="#555555", linestyle=":", linewidth=0.9)
            ax.plot(layers, means, color=look.color, marker=look.marker, linestyle=look.dashes)
            if len(points) > len(layers):
                several = True
                ax.plot(*zip(*points, strict=True), ".", color=look.color, alpha=0.35, markersize=2)
        ax.set_title(name, loc="left")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    name_axes(panels, columns, len(names), "layer")
    figure.supylabel("coefficient", fontsize=8)
    start = Line2D([], [], color="#555555", linestyle=":", linewidth=0.9, label="at the start")
    legend(figure, [label for label, _, _ in learned], [look for _, look, _ in learned], [start])
    notes = dict.fromkeys(getattr(_module(result), "note", "") for _, _, result in learned)
    said = ["Each panel has its own scale.", *notes]
    if several:
        said.append("Small points: several sets in one layer; lines: their mean.")
    caption = (
        f"After {_steps(learned)} steps, by layer, the first layer being 0. {' '.join(filter(None, said))}"
    )
    return save(figure, path, "Learned coefficients", caption)


def shape_plot(learned: Learned, path: Path) -> Plot:
    """One panel an activation: its function in each layer, and as it was at the start."""
    columns = min(3, len(learned))
    rows = -(-len(learned) // columns)
    figure = Figure(figsize=(WIDTH, 0.3 + 2.5 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    depth = 1 + max(layer for _, _, result in learned for layer, _ in by_layer(result))
    colors = matplotlib.colormaps["viridis"].resampled(max(depth, 2))
    for ax, (label, look, result) in zip(panels, learned, strict=False):
        assert result.run.coefficients is not None
        for (number, _), layer in zip(by_layer(result), result.run.coefficients["layers"], strict=True):
            ax.plot(*shape(result, layer), color=colors(number), linewidth=1.2)
        ax.plot(*shape(result), color="black", linestyle="--", linewidth=1.1)
        ax.set_title(label, loc="left", color=look.color, fontweight="bold")
        ax.set_xlim(-RANGE, RANGE)
        ax.set_xlabel("x, a row of standard-normal values" if result.spec.entry.normalizes else "x")
    panels[0].set_ylabel("y(x)")
    for ax in panels[len(learned) :]:
        ax.set_axis_off()
    scale = ScalarMappable(
        BoundaryNorm([layer - 0.5 for layer in range(max(depth, 2) + 1)], colors.N), colors
    )
    bar = figure.colorbar(scale, ax=panels, pad=0.02, aspect=30, label="layer")
    bar.ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    bar.ax.minorticks_off()
    start = Line2D([], [], color="black", linestyle="--", linewidth=1.1, label="at the start of training")
    figure.legend(handles=[start], loc="outside lower center")
    caption = f"After {_steps(learned)} steps, one curve a layer."
    if any(result.spec.entry.normalizes for _, _, result in learned):
        caption += (
            " An activation that normalises acts on a whole row: it is shown on one row of the FFN's width, "
            "the quantiles of the standard normal distribution."
        )
    return save(figure, path, "Shape of the learned activations", caption)


def shape(result: Result, layer: dict[str, Any] | None = None) -> tuple[Tensor, Tensor]:
    """(x, y(x)) in float64 with the coefficients of one layer, or as it is at the start of training.

    x is an even grid; for an activation that normalises, a row of the FFN's width with the quantiles of the
    standard normal distribution.
    """
    if result.spec.entry.normalizes:
        width = result.spec.matched_ffn_width or DEFAULT_ROW
        x = torch.special.ndtri((torch.arange(width, dtype=torch.float64) + 0.5) / width)
    else:
        x = torch.linspace(-RANGE, RANGE, 601, dtype=torch.float64)
    return x, _module(result, layer)(x).detach()


def _steps(learned: Learned) -> str:
    steps = sorted(
        {int(result.run.coefficients["step"]) for _, _, result in learned if result.run.coefficients}
    )
    return " and ".join(map(str, steps))


def _module(result: Result, layer: dict[str, Any] | None = None) -> torch.nn.Module:
    """The activation in float64, with the coefficients of one layer, or as it is at the start.

    Raises PolycomError where the coefficients are another activation's.
    """
    width, hidden = result.spec.matched_ffn_width or DEFAULT_ROW, result.facts.hidden or 1
    module = activations.build(result.spec.activation, width=width, hidden=hidden, dtype=torch.float64)
    if layer is not None:
        values = parameters(layer)
        try:
            module.load_state_dict(
                {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
            )
        except RuntimeError:
            raise PolycomError(
                f"{Record(result.run.path).coefficients} does not hold {result.spec.activation!r}: it has "
                + ", ".join(f"{name} of {len(value)}" for name, value in sorted(values.items()))
            ) from None
    return module
