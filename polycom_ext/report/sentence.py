"""What a report shows, in one sentence, from the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

from polycom_ext.report.families import Family, Group

REHEARSAL = "a rehearsal that does not reproduce the paper"
_KINDS = {"dense": "the dense model", "moe": "the mixture of experts"}


def summarize(families: Sequence[Family]) -> str:
    """The best activation of the first family of each kind against that family's baseline.

    For example: "PolyNorm ended at validation loss 4.30 against SwiGLU's 4.58 after 400 steps; a
    rehearsal that does not reproduce the paper."
    """
    first = {family.facts.kind: family for family in reversed(families)}
    clauses = [
        _clause(first[kind]) + (f" in {_KINDS[kind]}" if len(first) > 1 else "") for kind in sorted(first)
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
    base, frame, groups = family.baseline.label, family.losses, {one.label: one for one in family.groups}
    shared = frame[frame[base].notna() & frame.drop(columns=base).notna().any(axis=1)]
    if shared.empty:
        return "; ".join(map(_alone, family.groups))
    step, losses = int(shared.index[-1]), shared.iloc[-1]
    best = losses.drop(base).idxmin()
    winner, loser = (best, base) if losses[best] <= losses[base] else (base, best)
    digits = 2 if losses[loser] - losses[winner] >= 0.01 else 4
    seeds = [len(groups[label].counted) for label in (winner, loser)]
    of = f"the mean of {seeds[0]}" if seeds[0] == seeds[1] else f"the means of {seeds[0]} and {seeds[1]}"
    return (
        f"{winner} {'ended' if step == groups[winner].first.target else 'stood'} at validation loss "
        f"{losses[winner]:.{digits}f} against {loser}'s {losses[loser]:.{digits}f} "
        f"after {_steps(step, groups[winner])}" + (f", {of} seeds" if max(seeds) > 1 else "")
    )


def _alone(group: Group) -> str:
    """Where there is nothing to compare with."""
    step = max(one.step for one in group.counted.values())
    ends = {"validation": group.final("validation"), "training": group.numbers("train_loss")}
    for name, losses in ends.items():
        if math.isfinite(loss := losses.mean()):
            return f"{group.label} reached {name} loss {loss:.2f} after {_steps(step, group)}"
    return f"{group.label} logged no finite loss in {_steps(step, group)}"


def _steps(step: int, group: Group) -> str:
    target = group.first.target
    return f"{step} of {target} steps" if target is not None and step < target else f"{step} steps"
