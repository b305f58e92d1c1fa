"""Figures of what the activations learned: their coefficients and their shape, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

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

Having = Sequence[tuple[str, Look, Result]]
"""(label, look, run)"""
RANGE = 3.0
"""The shapes are drawn for x from -RANGE to RANGE."""
DEFAULT_ROW = 4096
"""Length of the standard-normal row where the spec gives no FFN width."""


def draw(learned: Having, folder: Path, slug: str, captions: Mapping[str, str]) -> list[Plot]:
    """Write the two figures as PNG files, with captions by figures.yaml.

    Raises PolycomError where the coefficients of a run are another activation's.
    """
    results = [one for _, _, one in learned]
    told = [(label, look, layers(one)) for label, look, one in learned]
    starts = [start(one) for one in results]
    steps = sorted({int((one.coefficients or {})["step"]) for one in results})
    after = f"After {' and '.join(map(str, steps))} steps"

    frames = [(label, look, by_layer(of)) for label, look, of in told]
    names = sorted({str(name) for _, _, frame in frames for name in frame})
    several = any(frame.index.has_duplicates for _, _, frame in frames)

    def means(frame: pd.DataFrame, name: str) -> list[tuple[int, float]]:
        return list(frame.groupby("layer").mean().get(name, {}).items())

    figure, panels = studies.over_layers(names, frames, means, "coefficient")
    for ax, name in zip(panels, names, strict=False):
        for (_, look, frame), module in zip(frames, starts, strict=True):
            if name in frame:
                ax.axhline(coefficients(module)[name], color="#555555", linestyle=":", linewidth=0.9)
                if several:
                    ax.plot(frame[name], ".", color=look.color, alpha=0.35, markersize=2)
    notes = dict.fromkeys(getattr(module, "note", "") for module in starts)
    said = [captions["coefficients"].format(after), *notes, captions["sets"] * several]
    caption = " ".join(filter(None, said))
    plots = [save(figure, folder / f"{slug}-coefficients.png", "Learned coefficients", caption)]

    having = [
        (label, look, [(layer, shape(module, one)) for layer, module in of])
        for (label, look, of), one in zip(told, results, strict=True)
    ]
    figure = studies.functions(having, [shape(*each) for each in zip(starts, results, strict=True)])
    caption = captions["shapes"].format(after)
    if any(one.spec.entry.normalizes for one in results):
        caption += f" {captions['row']}"
    title = "Shape of the learned activations"
    return [*plots, save(figure, folder / f"{slug}-shapes.png", title, caption)]


def layers(result: Result) -> list[tuple[int, torch.nn.Module]]:
    """(layer, the activation with its coefficients) for each entry of coefficients.json.

    Experts with coefficients of their own give several entries a layer.
    """
    found = []
    for position, entry in enumerate((result.coefficients or {})["layers"]):
        number, values, module = re.search(r"\.(\d+)(\.|$)", entry["name"]), parameters(entry), start(result)
        state = {name: torch.tensor(one, dtype=torch.float64) for name, one in values.items()}
        try:
            module.load_state_dict(state)
        except RuntimeError:
            has = ", ".join(f"{name} of {len(value)}" for name, value in sorted(values.items()))
            lacking = f"{Record(result.path).coefficients} does not hold {result.spec.activation!r}"
            raise PolycomError(f"{lacking}: it has {has}") from None
        found.append((int(number[1]) if number else position, module))
    return found


def start(result: Result) -> torch.nn.Module:
    """The activation as it is at the start of training, in float64."""
    width, hidden = result.spec.matched_ffn_width or DEFAULT_ROW, result.facts.hidden or 1
    return activations.build(result.spec.activation, width=width, hidden=hidden, dtype=torch.float64)


def by_layer(learned: Sequence[tuple[int, torch.nn.Module]]) -> pd.DataFrame:
    """Ascending, a column a coefficient by its title."""
    told = pd.DataFrame([{**coefficients(module), "layer": layer} for layer, module in learned])
    return told.set_index("layer").sort_index()


def shape(module: torch.nn.Module, result: Result) -> Shape:
    """The function that a run's activation is.

    Over an even grid; of one that normalises, over a row of the FFN's width, standard normal quantiles.
    """
    if result.spec.entry.normalizes:
        return on_normal_row(module, result.spec.matched_ffn_width or DEFAULT_ROW)
    x = torch.linspace(-RANGE, RANGE, 65, dtype=torch.float64)
    return on_row(x, module(x).detach())
