"""What a report shows, in one sentence, from the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

from polycom_ext.report.results import Family, Result, common_steps

REHEARSAL = "a rehearsal that does not reproduce the paper"
_KINDS = {"dense": "the dense model", "moe": "the mixture of experts"}


def summarize(families: Sequence[Family]) -> str:
    """The best run of the first family of each kind against that family's baseline.

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
        f"{one.label} diverged at step {one.diverged_at}"
        for family in families
        for one in family.results
        if one.diverged_at is not None
    ]
    parts = [", and ".join(clauses), *diverged]
    if any(family.rehearsal for family in families):
        parts.append(REHEARSAL)
    return "; ".join(parts) + "."


def _clause(family: Family) -> str:
    baseline = family.baseline
    rivals = [
        (one.validation[step], step, one)
        for one in family.results[1:]
        if (step := max(_finite_steps(one, baseline), default=None)) is not None
    ]
    if not rivals:
        return "; ".join(_alone(one) for one in family.results)
    furthest = max(step for _, step, _ in rivals)
    loss, step, best = min((rival for rival in rivals if rival[1] == furthest), key=lambda rival: rival[0])
    other = baseline.validation[step]
    winner, loser = (best, baseline) if loss <= other else (baseline, best)
    low, high = sorted((loss, other))
    digits = 2 if high - low >= 0.01 else 4
    verb = "ended" if step == winner.target else "stood"
    return (
        f"{winner.label} {verb} at validation loss {low:.{digits}f} "
        f"against {loser.label}'s {high:.{digits}f} after {_steps(step, winner)}"
    )


def _finite_steps(result: Result, baseline: Result) -> list[int]:
    return [
        step
        for step in common_steps(result, baseline)
        if math.isfinite(result.validation[step]) and math.isfinite(baseline.validation[step])
    ]


def _alone(result: Result) -> str:
    """Where there is nothing to compare with."""
    for name, loss in (("validation", result.validation_loss), ("training", result.train_loss)):
        if loss is not None and math.isfinite(loss):
            return f"{result.label} reached {name} loss {loss:.2f} after {_steps(result.run.step, result)}"
    return f"{result.label} logged no finite loss in {_steps(result.run.step, result)}"


def _steps(step: int, result: Result) -> str:
    count = f"{step} of {result.target}" if result.target is not None and step < result.target else str(step)
    return f"{count} steps"
