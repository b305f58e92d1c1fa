"""Groups of runs that differ in their seed alone, and families that differ in activation and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd

from polycom_ext import activations
from polycom_ext.evaluation import published
from polycom_ext.report.results import Result
from polycom_ext.runs import adapter

SLOWED = 0.1
"""A share of a run's time, beyond steps of its median length, that nothing of its own takes."""


@dataclass(frozen=True)
class Group:
    """Runs of one activation that differ in their seed alone, no seed twice."""

    results: list[Result]
    label: str
    """The activation's title; a run's name too where a family has the title twice."""

    @property
    def first(self) -> Result:
        """Which stands for all in what they share."""
        return self.results[0]

    @property
    def seeds(self) -> set[int | None]:
        """Of those that count."""
        return {one.facts.seed for one in self.counted}

    @property
    def counted(self) -> list[Result]:
        """Those that have finished, the last evaluation too, or all while none has."""
        done = [one for one in self.results if not one.unfinished]
        end = max((one.last_evaluation for one in done), default=0)
        return [one for one in done if one.last_evaluation == end] or self.results

    @property
    def progress(self) -> str:
        """Of those that count, as `Result.progress`; the range where they differ."""
        least, *_, most = sorted(self.counted * 2, key=lambda one: one.run.step)
        return most.progress if least.run.step == most.run.step else f"{least.run.step}–{most.progress}"

    @property
    def remarks(self) -> list[str]:
        """What keeps a run from standing beside the others."""
        said = []
        for one in self.results:
            which = f"seed {one.facts.seed} " if len(self.results) > 1 else ""
            if one.diverged_at is not None:
                said.append(f"{which}not finite from step {one.diverged_at}")
            if one not in self.counted:
                said.append(f"{which}left out: at step {one.progress}, evaluated at {one.last_evaluation}")
        return said

    def frame(self, name: str) -> pd.DataFrame:
        """A curve, a row a step at which all that count have a value, a column a seed."""
        having = {str(one.facts.seed): one.curves[name] for one in self.counted if name in one.curves}
        return pd.DataFrame(having).dropna()

    def final(self, name: str) -> pd.Series:
        """A curve's values at its last step, by seed."""
        frame = self.frame(name)
        return frame.iloc[-1] if len(frame) else pd.Series(dtype=float)

    def numbers(self, name: str) -> pd.Series:
        """One of `Result.numbers`, by seed, of those that count."""
        told = {str(one.facts.seed): one.numbers[name] for one in self.counted}
        return pd.Series(told, dtype=float).dropna()

    def along(self, steps: pd.Index, x: str) -> np.ndarray:
        """Where `steps` stand on an axis: `tokens`, or steps where their number is not known, or `hours`."""
        if x == "tokens":
            return steps.to_numpy(dtype=float) * (self.first.facts.tokens(1) or 1)
        timed = [one.hours for one in self.results if len(one.hours)]
        places = [np.interp(steps, one.index, one, left=0.0) for one in timed]
        return np.mean(places, axis=0) if places else np.full(len(steps), math.nan)


@dataclass(frozen=True)
class Family:
    """Runs that differ in activation and seed alone, in the registry's order: the first is the baseline."""

    groups: list[Group]
    title: str
    slug: str

    @property
    def results(self) -> list[Result]:
        """All runs."""
        return [one for group in self.groups for one in group.results]

    @property
    def baseline(self) -> Group:
        """What differences are taken from."""
        return self.groups[0]

    @property
    def facts(self) -> adapter.Facts:
        """Model, batch and data, the same for all."""
        return self.baseline.first.facts

    @property
    def published(self) -> published.Published:
        """What the paper says of this kind of model."""
        return published.load(self.facts.kind)

    @property
    def tokens(self) -> int | None:
        """Training tokens of the longest run."""
        return self.facts.tokens(max(one.run.step for one in self.results))

    @cached_property
    def untimely(self) -> str:
        """Why times say nothing of the activations, a clause; nothing where the records tell of no reason."""
        attempts = [{**told, "run": one.run.name} for one in self.results for told in one.run.attempts]
        told = pd.DataFrame(attempts, columns=["run", "host", "started", "ended"])
        told["host"] = told["host"].map(str, na_action="ignore")
        for name in ("started", "ended"):
            told[name] = pd.to_datetime(told[name].map(str), errors="coerce", utc=True, format="ISO8601")
        if told.empty or (unknown := told.isna().any(axis=1)).any():
            which = "some record" if told.empty else f"the record of {told['run'][unknown.idxmax()]}"
            return f"{which} does not say where and until when it ran"
        if told["host"].nunique() > 1:
            return f"they ran on different machines ({', '.join(sorted(told['host'].unique()))})"
        told = told.sort_values("started", ignore_index=True)
        if (shared := told["started"] < told["ended"].shift()).any():
            return " and ".join(told["run"][shared.idxmax() - 1 :][:2]) + " shared a machine"
        slowed = pd.Series({one.run.name: one.slowed for one in self.results})
        if slowed.max() > SLOWED:
            return f"something else slowed {slowed.idxmax()} down, for {slowed.max():.0%} of its time"
        return ""

    @property
    def best(self) -> Group | None:
        """Lowest validation loss among those that came furthest; None where they are fewer than two."""
        ends = {one.label: one.frame("validation").mean(axis=1).tail(1) for one in self.groups}
        step = max((end.index[0] for end in ends.values() if len(end)), default=None)
        rivals = [one for one in self.groups if math.isfinite(ends[one.label].get(step, math.nan))]
        return min(rivals, key=lambda one: ends[one.label][step]) if len(rivals) > 1 else None

    @property
    def rehearsal(self) -> bool:
        """Whether any run has a smaller model or fewer tokens than the paper's."""
        return not all(self.published.same_conditions(one.facts, one.run.step) for one in self.results)


def families(results: Sequence[Result]) -> list[Family]:
    """Group runs by everything in their specs but activation and seed; dense models first."""
    groups: dict[str, list[Result]] = {}
    keys: dict[str, dict[str, Any]] = {}
    for result in results:
        settings = _settings(result)
        key = repr(sorted(settings.items()))
        keys[key] = settings
        groups.setdefault(key, []).append(result)
    titles = {key: _title(group[0]) for key, group in groups.items()}
    made = []
    for key, group in groups.items():
        rivals = [other for other, title in titles.items() if title == titles[key]]
        kind, name = group[0].facts.kind, group[0].spec.upstream or group[0].spec.trainer
        slug = f"{kind}-{name}" + (f"-{rivals.index(key) + 1}" if len(rivals) > 1 else "")
        distinction = _distinction(keys[key], [keys[rival] for rival in rivals])
        made.append(Family(_grouped(group), titles[key] + distinction, slug))
    return sorted(made, key=lambda family: (family.facts.kind, family.title))


def _settings(result: Result) -> dict[str, Any]:
    """The spec, flattened, without names, activation and seed, and paths through a folder of its name."""
    trainer = adapter.find(result.spec.trainer)
    left_out = ("name", "activation", "sources", "rehearsal_of", f"{trainer.section}.{trainer.seed}")
    return {
        key: value
        for key, value in flatten(result.spec.as_mapping(), ".").items()
        if key.partition(".")[0] not in left_out
        and key not in left_out
        and not (isinstance(value, str) and result.run.name in PurePath(value).parts)
    }


def flatten(mapping: dict[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """One mapping of all in it that is no mapping, its keys joined."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            flat |= flatten(value, separator, f"{prefix}{key}{separator}")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _title(result: Result) -> str:
    kind = "Mixture-of-experts model" if result.facts.experts else "Dense model"
    version = adapter.chosen(adapter.find(result.spec.trainer), result.spec)
    return f"{kind}, {version.title if version else result.spec.trainer}"


def _distinction(settings: dict[str, Any], rivals: list[dict[str, Any]]) -> str:
    """What tells a family from those of the same title, in the spec's own words."""
    if len(rivals) == 1:
        return ""
    absent = object()
    names = sorted({name for rival in rivals for name in rival})
    differing = [name for name in names if len({repr(rival.get(name, absent)) for rival in rivals}) > 1]
    return ": " + ", ".join(f"{name} {settings.get(name, 'not set')}" for name in differing[:4])


def _grouped(results: list[Result]) -> list[Group]:
    """In the registry's order, then by polynomial order; what repeats a seed stands in a group of its own."""
    order = activations.names()
    results = sorted(
        results, key=lambda one: (order.index(one.spec.entry.name), one.order or 0, one.run.name)
    )
    groups: dict[tuple[str, int], list[Result]] = {}
    for one in results:
        again = sum(
            one.facts.seed == other.facts.seed
            for at, group in groups.items()
            for other in group
            if at[0] == one.title
        )
        groups.setdefault((one.title, again), []).append(one)
    titles = [title for title, _ in groups]
    return [
        Group(
            sorted(group, key=lambda one: (one.facts.seed is not None, one.facts.seed or 0)),
            title if titles.count(title) == 1 else f"{title} · {group[0].run.name}",
        )
        for (title, _), group in groups.items()
    ]
