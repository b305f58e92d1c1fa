"""Groups of runs that differ in their seed alone, and families that differ in activation and seed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd

from polycom_ext import activations, drawing
from polycom_ext.evaluation import published
from polycom_ext.report.results import Result
from polycom_ext.runs import adapter, document

SLOWED = 0.1
"""A share of a run's time, beyond steps of its median length, that nothing of its own takes."""


@dataclass(frozen=True)
class Group:
    """Runs of one activation that differ in their seed alone, no seed twice."""

    results: list[Result]
    label: str
    """The activation's title; a run's name too where a family has the title twice."""
    look: drawing.Look

    @property
    def first(self) -> Result:
        """Which stands for all in what they share."""
        return self.results[0]

    @cached_property
    def counted(self) -> dict[str, Result]:
        """By seed those that have finished, the last evaluation too, or all while none has."""
        done = [one for one in self.results if not one.unfinished]
        end = max((one.last_evaluation for one in done), default=0)
        counted = [one for one in done if one.last_evaluation == end] or self.results
        return {str(one.facts.seed): one for one in counted}

    @property
    def progress(self) -> str:
        """Of those that count, as `Result.progress`; the range where they differ."""
        ends = sorted(self.counted.values(), key=lambda one: one.step)
        least, most = ends[0].step, ends[-1].step
        return (f"{least}–" if least < most else "") + ends[-1].progress

    @property
    def remarks(self) -> list[str]:
        """What keeps a run from standing beside the others."""
        said = []
        for one in self.results:
            which = f"seed {one.facts.seed} " if len(self.results) > 1 else ""
            if one.diverged_at is not None:
                said.append(f"{which}not finite from step {one.diverged_at}")
            if one not in self.counted.values():
                said.append(f"{which}left out: at step {one.progress}, evaluated at {one.last_evaluation}")
        return said

    @property
    def names(self) -> list[str]:
        """Of the curves of those that count."""
        return list(dict.fromkeys(name for one in self.counted.values() for name in one.curves))

    def frame(self, name: str) -> pd.DataFrame:
        """A curve, a row a step at which all that count have a value, a column a seed."""
        having = {seed: one.curves[name] for seed, one in self.counted.items() if name in one.curves}
        return pd.DataFrame(having).dropna()

    def final(self, name: str) -> pd.Series:
        """A curve's values at its last step, by seed."""
        frame = self.frame(name)
        return frame.iloc[-1] if len(frame) else pd.Series(dtype=float)

    def numbers(self, name: str) -> pd.Series:
        """One of `Result.numbers`, by seed, of those that count."""
        return pd.Series({seed: one.numbers[name] for seed, one in self.counted.items()}, dtype=float)

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
    def unmatched(self) -> list[str]:
        """Labels of the groups that have no seed in common with the baseline."""
        seeds = self.baseline.counted.keys()
        return [one.label for one in self.groups if not one.counted.keys() & seeds]

    @property
    def published(self) -> published.Published:
        """What the paper says of this kind of model."""
        return published.load(self.facts.kind)

    @property
    def tokens(self) -> int | None:
        """Training tokens of the longest run."""
        return self.facts.tokens(max(one.step for one in self.results))

    @cached_property
    def untimely(self) -> str:
        """Why times say nothing of the activations, a clause; nothing where the records tell of no reason."""
        attempts = [{**told, "run": one.name} for one in self.results for told in one.attempts]
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
        times = {one.name: one.seconds for one in self.results if one.seconds.sum()}
        slowed = pd.Series({name: 1 - one.median() / one.mean() for name, one in times.items()})
        if slowed.max() > SLOWED:
            return f"something else slowed {slowed.idxmax()} down, for {slowed.max():.0%} of its time"
        return ""

    @cached_property
    def losses(self) -> pd.DataFrame:
        """Validation loss, the mean over the seeds: a row a step, a column a group, NaN where not finite."""
        means = {one.label: one.frame("validation").mean(axis=1) for one in self.groups}
        return pd.DataFrame(means).replace(np.inf, np.nan)

    @property
    def best(self) -> str | None:
        """Lowest validation loss among those that came furthest; None where they are fewer than two."""
        rivals = self.losses.tail(1).T.dropna()
        return str(rivals.iloc[:, 0].idxmin()) if rivals.size > 1 else None

    @property
    def rehearsal(self) -> bool:
        """Whether any run has a smaller model or fewer tokens than the paper's."""
        return not all(self.published.same_conditions(one.facts, one.step) for one in self.results)


def families(results: Sequence[Result]) -> list[Family]:
    """Group runs by everything in their specs but activation and seed; dense models first.

    Those of one title are told apart by a number in the slug, and in the title in the spec's own words.
    """
    specs = [_settings(one) for one in results]
    told = pd.DataFrame([{name: repr(value) for name, value in one.items()} for one in specs], dtype=object)
    told = told.fillna("").sort_index(axis=1)
    made = []
    for title, rivals in told.groupby(pd.Series(map(_title, results)), sort=False):
        differing = rivals.columns[rivals.nunique() > 1]
        for number, (_, same) in enumerate(rivals.groupby(rivals.apply(tuple, axis=1), sort=False), 1):
            first, spec = results[same.index[0]], specs[same.index[0]]
            slug = f"{first.facts.kind}-{first.spec.upstream or first.spec.trainer}"
            words = ", ".join(f"{name} {spec.get(name, 'not set')}" for name in differing[:4])
            names = (f"{title}: {words}", f"{slug}-{number}") if words else (str(title), slug)
            made.append(Family(_grouped([results[index] for index in same.index]), *names))
    return sorted(made, key=lambda family: (family.facts.kind, family.title))


def _settings(result: Result) -> dict[str, Any]:
    """The spec, flattened, without names, activation and seed, and paths through a folder of its name."""
    trainer = adapter.find(result.spec.trainer)
    left_out = {"name", "activation", "sources", "rehearsal_of", f"{trainer.section}.{trainer.seed}"}
    return {
        key: value
        for key, value in document.flat(result.spec.as_mapping()).items()
        if left_out.isdisjoint({key, key.partition(".")[0]})
        and not (isinstance(value, str) and result.name in PurePath(value).parts)
    }


def _title(result: Result) -> str:
    kind = "Mixture-of-experts model" if result.facts.experts else "Dense model"
    version = adapter.chosen(adapter.find(result.spec.trainer), result.spec)
    return f"{kind}, {version.title if version else result.spec.trainer}"


def _grouped(results: list[Result]) -> list[Group]:
    """In the registry's order, then by polynomial order; what repeats a seed stands in a group of its own."""

    def place(one: Result) -> tuple[int, int, int, str]:
        seed = -1 if one.facts.seed is None else one.facts.seed
        return activations.names().index(one.spec.entry.name), one.order or 0, seed, one.name

    times: Counter[tuple[str, int | None]] = Counter()
    groups: dict[tuple[str, int], list[Result]] = {}
    for one in sorted(results, key=place):
        times[one.title, one.facts.seed] += 1
        groups.setdefault((one.title, times[one.title, one.facts.seed]), []).append(one)
    repeated, names = {title for title, time in groups if time > 1}, Counter(one.name for one in results)
    looks, made = drawing.looks([group[0].spec.entry.name for group in groups.values()]), []
    for ((title, _), group), look in zip(groups.items(), looks, strict=True):
        which = group[0].name if names[group[0].name] == 1 else group[0].path
        made.append(Group(group, f"{title} · {which}" if title in repeated else title, look))
    return made
