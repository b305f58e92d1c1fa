"""Figures of what the activations learned: their coefficients and their shape, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from polycom_ext import activations
from polycom_ext.analysis import plots as studies
from polycom_ext.analysis.shapes import Shape, on_normal_row, on_row
from polycom_ext.drawing import Look, Plot, save
from polycom_ext.errors import PolycomError
from polycom_ext.modules import coefficients
from polycom_ext.report.results import Result
from polycom_ext.runs.record import Record, parameters

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
    told = {
        label: pd.DataFrame([{**of, "layer": at} for at, of in by_layer(one)]) for label, _, one in learned
    }
    frames = {label: frame.set_index("layer").sort_index() for label, frame in told.items()}
    names = sorted({str(name) for frame in frames.values() for name in frame})
    several = any(frame.index.has_duplicates for frame in frames.values())

    def means(frame: pd.DataFrame, name: str) -> list[tuple[int, float]]:
        return list(frame.groupby("layer")[name].mean().items()) if name in frame else []

    looked = [(label, look, frames[label]) for label, look, _ in learned]
    figure, panels = studies.over_layers(names, looked, means, "coefficient")
    for ax, name in zip(panels, names, strict=False):
        for label, look, result in learned:
            if name in frames[label]:
                start = coefficients(_module(result))[name]
                ax.axhline(start, color="#555555", linestyle=":", linewidth=0.9)
                if several:
                    ax.plot(frames[label][name], ".", color=look.color, alpha=0.35, markersize=2)
    notes = dict.fromkeys(getattr(_module(result), "note", "") for _, _, result in learned)
    points = ["Small points: several sets in one layer; lines: their mean."] * several
    said = " ".join(filter(None, ["Dotted: at the start. Each panel has its own scale.", *notes, *points]))
    caption = f"After {_steps(learned)} steps, by layer, the first layer being 0. {said}"
    return save(figure, path, "Learned coefficients", caption)


def shape_plot(learned: Learned, path: Path) -> Plot:
    """One panel an activation: its function in each layer, and as it was at the start."""
    having = []
    for label, look, one in learned:
        layers = zip(by_layer(one), (one.run.coefficients or {})["layers"], strict=True)
        having.append((label, look, [(number, shape(one, layer)) for (number, _), layer in layers]))
    figure = studies.functions(having, [shape(one) for _, _, one in learned])
    caption = f"After {_steps(learned)} steps, one curve a layer; dashed: at the start of training."
    if any(one.spec.entry.normalizes for _, _, one in learned):
        caption += (
            " An activation that normalises acts on a whole row: it is shown on one row of the FFN's width, "
            "the quantiles of the standard normal distribution."
        )
    return save(figure, path, "Shape of the learned activations", caption)


def shape(result: Result, layer: dict[str, Any] | None = None) -> Shape:
    """The function with the coefficients of one layer, or as it is at the start of training.

    Over an even grid; of one that normalises, over a row of the FFN's width, standard normal quantiles.
    """
    module = _module(result, layer)
    if result.spec.entry.normalizes:
        return on_normal_row(module, result.spec.matched_ffn_width or DEFAULT_ROW)
    x = torch.linspace(-RANGE, RANGE, 65, dtype=torch.float64)
    return on_row(x, module(x).detach())


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
