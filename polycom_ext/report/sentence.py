"""What a report shows, in one sentence, from the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from polycom_ext.report.families import Family, Group

REHEARSAL = "a rehearsal that does not reproduce the paper"
_KINDS = {"dense": "the dense model", "moe": "the mixture of experts"}


def summarize(families: Sequence[Family]) -> str:
    """The best activation of the first family of each kind against that family's baseline.

    For example: "PolyNorm ended at validation loss 4.30 against SwiGLU's 4.58 after 400 steps; a
    rehearsal that does not reproduce the paper."
    """
    first: dict[str, Family] = {}
    for family in families:
        first.setdefault(family.facts.kind, family)
    clauses = [
        _clause(family) + (f" in {_KINDS[kind]}" if len(first) > 1 else "") for kind, family in first.items()
    ]
    diverged = [
        f"{group.label} diverged at step {min(steps)}"
        for family in families
        for group in family.groups
        if (steps := [one.diverged_at for one in group.results if one.diverged_at is not None])
    ]
    parts = [", and ".join(clauses), *diverged]
    if any(family.rehearsal for family in families):
        parts.append(REHEARSAL)
    return "; ".join(parts) + "."


def _clause(family: Family) -> str:
    curves = {group.label: _finite(group) for group in family.groups}
    base = curves.pop(family.baseline.label)
    common = {label: sorted(set(curve.index) & set(base.index)) for label, curve in curves.items()}
    step = max((steps[-1] for steps in common.values() if steps), default=None)
    if step is None:
        return "; ".join(map(_alone, family.groups))
    rivals = [group for group in family.groups[1:] if common[group.label][-1:] == [step]]
    best = min(rivals, key=lambda group: curves[group.label][step])
    loss, other = curves[best.label][step], base[step]
    winner, loser = (best, family.baseline) if loss <= other else (family.baseline, best)
    digits = 2 if abs(loss - other) >= 0.01 else 4
    seeds = [len(group.counted) for group in (winner, loser)]
    said = f", the mean of {seeds[0]} seeds" if seeds[0] == seeds[1] > 1 else ""
    return (
        f"{winner.label} {'ended' if step == winner.first.target else 'stood'} at validation loss "
        f"{min(loss, other):.{digits}f} against {loser.label}'s {max(loss, other):.{digits}f} "
        f"after {_steps(step, winner)}{said}"
    )


def _finite(group: Group) -> pd.Series:
    mean = group.frame("validation").mean(axis=1)
    return mean[np.isfinite(mean)]


def _alone(group: Group) -> str:
    """Where there is nothing to compare with."""
    step = max(one.run.step for one in group.counted)
    for name, losses in (
        ("validation", group.final("validation")),
        ("training", group.numbers("train_loss")),
    ):
        if len(losses) and math.isfinite(loss := losses.mean()):
            return f"{group.label} reached {name} loss {loss:.2f} after {_steps(step, group)}"
    return f"{group.label} logged no finite loss in {_steps(step, group)}"


def _steps(step: int, group: Group) -> str:
    target = group.first.target
    return f"{step} of {target} steps" if target is not None and step < target else f"{step} steps"
