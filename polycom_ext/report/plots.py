"""The figures of one family: losses, perplexity, texts and tasks, learned coefficients, learned shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from polycom_ext.analysis import plots as studies
from polycom_ext.analysis.study import Study
from polycom_ext.drawing import (
    WIDTH,
    Look,
    Plot,
    count_steps,
    cut,
    label_ends,
    legend,
    looks,
    name_axes,
    save,
    smooth,
    style,
)
from polycom_ext.evaluation import published
from polycom_ext.report.learned import coefficient_plot, shape_plot
from polycom_ext.report.results import Family, Result, last, perplexity
from polycom_ext.runs.record import Series

STEP = "training step"


def draw(family: Family, folder: Path) -> list[Plot]:
    """Write the figures of a family as PNG files; those for which nothing was logged are left out."""
    with style():
        drawn = looks([result.spec.entry.name for result in family.results])
        plots = [_losses(family, drawn, folder)]
        if any(result.validation for result in family.results):
            plots.append(_perplexity(family, drawn, folder))
        if any(len(result.losses) > 1 for result in family.results):
            plots.append(
                _small_multiples(
                    family,
                    drawn,
                    folder / f"{family.slug}-validation.png",
                    lambda result: result.losses,
                    "validation loss (nats/token)",
                    "Validation loss by text",
                )
            )
        if any(result.accuracies for result in family.results):
            plots.append(
                _small_multiples(
                    family,
                    drawn,
                    folder / f"{family.slug}-accuracy.png",
                    lambda result: result.accuracies,
                    "accuracy (%)",
                    "Downstream accuracy by task",
                )
            )
        learned = [
            (result, look)
            for result, look in zip(family.results, drawn, strict=True)
            if result.run.coefficients and result.run.coefficients.get("layers")
        ]
        if learned:
            plots.append(coefficient_plot(learned, folder / f"{family.slug}-coefficients.png"))
            plots.append(shape_plot(learned, folder / f"{family.slug}-shapes.png"))
    studied = [
        (result.label, look, Study.from_json(result.run.analysis))
        for result, look in zip(family.results, drawn, strict=True)
        if result.run.analysis is not None
    ]
    return [*plots, *(studies.draw(studied, folder, family.slug) if studied else [])]


def _losses(family: Family, drawn: Sequence[Look], folder: Path) -> Plot:
    validated = any(result.validation for result in family.results)
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    axes = figure.subplots(1, 2 if validated else 1, sharey=True, squeeze=False)[0]
    curves, windows, ends = [], set(), []
    for result, look in zip(family.results, drawn, strict=True):
        smoothed, window = smooth(result.train)
        windows.add(window)
        curves += [smoothed, result.validation]
        axes[0].plot(*_points(result.train), color=look.color, alpha=0.16, linewidth=0.5)
        axes[0].plot(*_points(smoothed), color=look.color, linestyle=look.dashes)
        _mark_divergence(axes[0], smoothed, look)
        if validated:
            axes[1].plot(
                *_points(result.validation), color=look.color, linestyle=look.dashes, marker=look.marker
            )
        end = _end(result.validation) or _end(smoothed)
        if end:
            ends.append((*end, _annotated(result), look))
    limits = cut(curves)
    for ax, title in zip(axes, ("training", "validation"), strict=False):
        ax.set_xlabel(STEP)
        ax.set_title(title, loc="left")
        count_steps(ax, 5)
    if limits:
        axes[0].set_ylim(*limits)
    axes[0].set_ylabel("cross-entropy loss (nats/token)")
    axes[-1].set_xlim(left=axes[0].get_xlim()[0])
    label_ends(figure, axes[-1], ends)
    window = max(windows)
    caption = (
        f"{'Left: training' if validated else 'Training'} loss"
        + (f", thin as logged, thick the centred mean of {window} values" if window > 1 else " as logged")
        + (". Right: loss on the validation text" if validated else "")
        + (". The first steps lie above the frame" if limits else "")
        + _divergences(family)
        + "."
    )
    return save(figure, folder / f"{family.slug}-loss.png", "Loss", caption)


def _perplexity(family: Family, drawn: Sequence[Look], folder: Path) -> Plot:
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    ax = figure.subplots()
    curves, ends = [], []
    for result, look in zip(family.results, drawn, strict=True):
        curve = {step: perplexity(loss) for step, loss in result.validation.items()}
        curves.append(curve)
        ax.plot(*_points(curve), color=look.color, linestyle=look.dashes, marker=look.marker)
        end = _end(curve)
        if end:
            final = last(curve)
            value = f"{final:.1f}" if final is not None and math.isfinite(final) else "not finite"
            ends.append((*end, f"{_annotated(result)}  {value}", look))
    limits = cut(curves)
    if limits:
        ax.set_ylim(*limits)
    ax.set_xlabel(STEP)
    ax.set_ylabel("validation perplexity, exp(loss)")
    count_steps(ax, 8)
    label_ends(figure, ax, ends)
    caption = (
        "exp of the validation loss"
        + (" (mean over the texts)" if any(len(result.losses) > 1 for result in family.results) else "")
        + ", in the units of this tokenizer"
        + ("; the first points lie above the frame" if limits else "")
        + "."
    )
    return save(figure, folder / f"{family.slug}-perplexity.png", "Validation perplexity", caption)


def _small_multiples(
    family: Family,
    drawn: Sequence[Look],
    path: Path,
    panels: Callable[[Result], dict[str, Series]],
    ylabel: str,
    title: str,
) -> Plot:
    names = sorted({name for result in family.results for name in panels(result)})
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(WIDTH, 0.6 + 1.55 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for ax, name in zip(grid, names, strict=False):
        curves = [panels(result).get(name, {}) for result in family.results]
        for curve, look in zip(curves, drawn, strict=True):
            ax.plot(
                *_points(curve), color=look.color, linestyle=look.dashes, marker=look.marker, markersize=2.6
            )
        limits = cut(curves) if "loss" in ylabel else None
        if limits:
            ax.set_ylim(*limits)
        ax.set_title(published.titles().get(name, name), loc="left", fontsize=7.5)
        count_steps(ax, 4)
    name_axes(grid, columns, len(names), STEP)
    figure.supylabel(ylabel, fontsize=8)
    legend(figure, [result.label for result in family.results], drawn)
    return save(figure, path, title, f"{title}, as evaluated during training.")


def _points(series: Series) -> tuple[list[int], list[float]]:
    """Infinite values are drawn as gaps, as NaN is."""
    return list(series), [value if math.isfinite(value) else math.nan for value in series.values()]


def _end(series: Series) -> tuple[float, float] | None:
    finite = [(float(step), value) for step, value in series.items() if math.isfinite(value)]
    return finite[-1] if finite else None


def _annotated(result: Result) -> str:
    if result.diverged_at is not None:
        return f"{result.label} (not finite from {result.diverged_at})"
    return f"{result.label} (to step {result.run.step})" if result.unfinished else result.label


def _mark_divergence(ax: Axes, series: Series, look: Look) -> None:
    """A cross at the last finite value before the first one that is not."""
    end = None
    for step, value in series.items():
        if not math.isfinite(value):
            if end:
                ax.plot(
                    *end, color=look.color, marker="x", markersize=7, markeredgewidth=1.6, linestyle="none"
                )
            return
        end = (step, value)


def _divergences(family: Family) -> str:
    """The same for the caption."""
    parts = [
        f"{one.label} from step {one.diverged_at}" for one in family.results if one.diverged_at is not None
    ]
    return f". A cross: the loss is not a finite number ({', '.join(parts)})" if parts else ""
