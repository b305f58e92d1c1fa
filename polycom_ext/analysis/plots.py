"""The figures of studies, several checkpoints in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from polycom_ext.analysis.shapes import Shape
from polycom_ext.analysis.study import WEIGHTS, Study
from polycom_ext.drawing import WIDTH, Look, Plot, count_steps, legend, name_axes, save, style
from polycom_ext.runs.record import mean

T = TypeVar("T")
Studied = Sequence[tuple[str, Look, Study]]
"""(label, look, study)"""
COLUMNS = 4
ACTIVITY = {
    "constant": "share of dead units",
    "activation_rms": "rms of the activation",
    "ffn_rms": "rms of what the FFN adds",
    "hidden_rms": "rms of the hidden states",
}


def draw(studied: Studied, folder: Path, slug: str) -> list[Plot]:
    """Write the figures as PNG files; those that need text only of the studies that have seen some.

    `coefficients` and `shapes` draw what a report has from the runs' records.
    """
    seen = [one for one in studied if one[2].activity is not None]
    trained = [one for one in studied if one[2].history]
    with style():
        plots = [_ranks(studied, folder / f"{slug}-effective-rank.png")]
        if trained:
            plots.append(_history(trained, folder / f"{slug}-coefficients-over-training.png"))
        if seen:
            plots.append(_similarity(seen, folder / f"{slug}-similarity.png"))
            plots.append(_activity(seen, folder / f"{slug}-activity.png"))
    return plots


def over_layers(
    titles: Sequence[str],
    studied: Sequence[tuple[str, Look, T]],
    values: Callable[[T, str], Sequence[tuple[int, float]]],
    ylabel: str,
) -> tuple[Figure, list[Axes]]:
    """A panel a title, over the layers; each checkpoint a line."""
    columns = min(COLUMNS, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(WIDTH, 0.9 + 1.8 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for ax, title in zip(panels, titles, strict=False):
        for _, look, study in studied:
            points = values(study, title)
            if points:
                x, y = zip(*points, strict=True)
                ax.plot(x, y, color=look.color, marker=look.marker, linestyle=look.dashes)
        ax.set_title(title, loc="left")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    name_axes(panels, columns, len(titles), "layer")
    figure.supylabel(ylabel, fontsize=8)
    legend(figure, [label for label, _, _ in studied], [look for _, look, _ in studied])
    return figure, panels


def _of(studied: Studied) -> str:
    """Which checkpoints a figure is of: a run may have gone on since."""
    return f"Of {', '.join(dict.fromkeys(Path(study.source).name for _, _, study in studied))}."


def _ranks(studied: Studied, path: Path) -> Plot:
    names = [name for name in WEIGHTS if any(name in study.full_rank for _, _, study in studied)]

    def means(study: Study, name: str) -> list[tuple[int, float]]:
        return [
            (index, mean(layer.effective_rank[name]))
            for index, layer in enumerate(study.layers)
            if name in layer.effective_rank
        ]

    figure, panels = over_layers(names, studied, means, "effective rank")
    for ax, name in zip(panels, names, strict=False):
        most = max(study.full_rank.get(name, 0) for _, _, study in studied)
        ax.axhline(most, color="#555555", linestyle=":", linewidth=0.9)
    experts = any(len(layer.effective_rank[names[0]]) > 1 for _, _, s in studied for layer in s.layers)
    of_experts = " Of experts the mean." if experts else ""
    caption = (
        "Of each weight of the FFNs: exp of the entropy of its singular values, by layer; dotted, the most "
        f"that the shape allows.{of_experts} The paper's figure 6 in this model. {_of(studied)}"
    )
    return save(figure, path, "Effective rank of the FFN's weights", caption)


def coefficients(studied: Studied, path: Path) -> Plot | None:
    """What the activations have learned, by layer; None where there is nothing to learn."""
    having = [one for one in studied if any(layer.coefficients for layer in one[2].layers)]
    if not having:
        return None
    names = sorted({name for _, _, study in having for layer in study.layers for name in layer.coefficients})

    def series(study: Study, name: str) -> list[tuple[int, float]]:
        layers = enumerate(study.layers)
        return [(index, layer.coefficients[name]) for index, layer in layers if name in layer.coefficients]

    with style():
        figure, _ = over_layers(names, having, series, "coefficient")
        return save(figure, path, "Coefficients by layer", "Each panel has its own scale.")


def shapes(studied: Studied, path: Path) -> Plot | None:
    """The functions that the activations are, a panel a checkpoint; None where all are gated."""
    having = [
        (label, look, [(layer, shape) for layer, shape in enumerate(study.shapes) if shape is not None])
        for label, look, study in studied
        if any(study.shapes)
    ]
    if not having:
        return None
    caption = (
        "One curve a layer, over the numbers of one row of its inputs: with text the row of which the "
        "rms is the median of all, else the quantiles of the standard normal distribution."
    )
    with style():
        return save(functions(having), path, "Shapes of the activations", caption)


def functions(
    having: Sequence[tuple[str, Look, Sequence[tuple[int, Shape]]]], start: Sequence[Shape] = ()
) -> Figure:
    """A panel of each, of its layers by number; dashed what it was at the start of training, if given."""
    columns = min(COLUMNS, len(having))
    rows = -(-len(having) // columns)
    depth = 1 + max(layer for _, _, layers in having for layer, _ in layers)
    colors = matplotlib.colormaps["viridis"].resampled(max(depth, 2))
    figure = Figure(figsize=(WIDTH, 0.5 + 2.1 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for index, (ax, (label, look, layers)) in enumerate(zip(panels, having, strict=False)):
        for layer, shape in layers:
            ax.plot(shape.x, shape.y, color=colors(layer), linewidth=1.1)
        for shape in start[index : index + 1]:
            ax.plot(shape.x, shape.y, color="black", linestyle="--", linewidth=1.1)
        ax.set_title(label, loc="left", color=look.color, fontweight="bold")
    name_axes(panels, columns, len(having), "x")
    figure.supylabel("y(x)", fontsize=8)
    norm = BoundaryNorm([index - 0.5 for index in range(max(depth, 2) + 1)], colors.N)
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=panels, shrink=0.8, label="layer")
    bar.ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    bar.ax.minorticks_off()
    return figure


def _history(studied: Studied, path: Path) -> Plot:
    """A panel a coefficient, over the steps: thin its value in each layer, thick their mean."""
    moments = [moment for _, _, study in studied for moment in study.history]
    names = sorted({name for moment in moments for layer in moment.layers for name in layer})
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(WIDTH, 0.7 + 1.7 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for ax, name in zip(panels, names, strict=False):
        for _, look, study in studied:
            steps = [moment.step for moment in study.history if all(name in layer for layer in moment.layers)]
            values = [
                [layer[name] for layer in moment.layers] for moment in study.history if moment.step in steps
            ]
            if not steps:
                continue
            ax.plot(steps, values, color=look.color, linewidth=0.5, alpha=0.35)
            ax.plot(
                steps,
                [mean(of) for of in values],
                color=look.color,
                marker=look.marker,
                linestyle=look.dashes,
            )
        ax.set_title(name, loc="left")
        count_steps(ax, 4)
    name_axes(panels, columns, len(names), "training step")
    figure.supylabel("coefficient", fontsize=8)
    legend(figure, [label for label, _, _ in studied], [look for _, look, _ in studied])
    caption = "At each checkpoint of a run that is there: thin in each layer, thick their mean."
    return save(figure, path, "Coefficients over training", caption)


def _similarity(studied: Studied, path: Path) -> Plot:
    columns = min(COLUMNS, len(studied))
    rows = -(-len(studied) // columns)
    figure = Figure(figsize=(WIDTH, 0.4 + (WIDTH / columns) * rows * 0.95), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    image = None
    for ax, (label, _, study) in zip(panels, studied, strict=False):
        assert study.activity is not None
        image = ax.imshow(study.activity.similarity, vmin=0, vmax=1, cmap="viridis", origin="lower")
        ax.set_title(label, loc="left")
        ax.grid(visible=False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    name_axes(panels, columns, len(studied), "after layer")
    assert image is not None
    figure.colorbar(image, ax=panels, shrink=0.8, label="cosine")
    tokens = studied[0][2].activity
    caption = (
        "Mean cosine between a token's hidden states after any two layers, 0 being the embedding; below 0 "
        f"as 0. Over {tokens.tokens if tokens else 0:,} tokens. The paper's figure 7 in this model. "
        f"{_of(studied)}"
    )
    return save(figure, path, "Similarity of hidden states", caption)


def _activity(studied: Studied, path: Path) -> Plot:
    named = {title: name for name, title in ACTIVITY.items()}

    def series(study: Study, title: str) -> list[tuple[int, float]]:
        return list(enumerate(getattr(study.activity, named[title])))

    figure, panels = over_layers(list(named), studied, series, "")
    for ax in panels[: len(named)]:
        ax.set_ylim(bottom=0, top=max(ax.get_ylim()[1], 0.01))
    caption = (
        "By layer. A unit is dead that gave the same number for every token, as one of a ReLU that is "
        "never reached; of experts, among those that got two tokens or more."
    )
    return save(figure, path, "Units and sizes", caption)
