"""Studies as CSV files, a row a number."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from polycom_ext.analysis.study import Study

Rows = Iterable[tuple[Any, ...]]


def write(studies: Sequence[tuple[str, Study]], folder: Path) -> None:
    """effective-rank.csv, coefficients.csv and shapes.csv; of text similarity.csv and activity.csv.

    And of runs of several checkpoints coefficients-over-training.csv.
    """
    _write(
        folder / "effective-rank.csv",
        ("checkpoint", "layer", "weight", "expert", "effective_rank", "full_rank"),
        (
            (label, index, name, expert, rank, study.full_rank[name])
            for label, study in studies
            for index, layer in enumerate(study.layers)
            for name, ranks in layer.effective_rank.items()
            for expert, rank in enumerate(ranks)
        ),
    )
    _write(
        folder / "coefficients.csv",
        ("checkpoint", "layer", "coefficient", "value"),
        (
            (label, index, name, value)
            for label, study in studies
            for index, layer in enumerate(study.layers)
            for name, value in layer.coefficients.items()
        ),
    )
    _write(
        folder / "shapes.csv",
        ("checkpoint", "layer", "rms_of_row", "x", "y"),
        (
            (label, index, shape.rms, x, y)
            for label, study in studies
            for index, shape in enumerate(study.shapes)
            if shape is not None
            for x, y in zip(shape.x, shape.y, strict=True)
        ),
    )
    if any(study.history for _, study in studies):
        _write(
            folder / "coefficients-over-training.csv",
            ("checkpoint", "step", "layer", "coefficient", "value"),
            (
                (label, moment.step, index, name, value)
                for label, study in studies
                for moment in study.history
                for index, layer in enumerate(moment.layers)
                for name, value in layer.items()
            ),
        )
    seen = [(label, study.activity) for label, study in studies if study.activity is not None]
    if not seen:
        return
    _write(
        folder / "similarity.csv",
        ("checkpoint", "after_layer", "and_after_layer", "cosine"),
        (
            (label, one, other, cosine)
            for label, activity in seen
            for one, row in enumerate(activity.similarity)
            for other, cosine in enumerate(row)
        ),
    )
    _write(
        folder / "activity.csv",
        ("checkpoint", "layer", "constant_units", "activation_rms", "ffn_rms", "hidden_rms"),
        (
            (label, index, *values)
            for label, activity in seen
            for index, values in enumerate(
                zip(
                    activity.constant,
                    activity.activation_rms,
                    activity.ffn_rms,
                    activity.hidden_rms,
                    strict=True,
                )
            )
        ),
    )


def _write(path: Path, header: tuple[str, ...], rows: Rows) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
