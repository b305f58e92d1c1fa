"""The numbers of a report: one result a run, and families of runs that differ in activation and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePath
from statistics import median
from typing import Any

from polycom_ext import activations
from polycom_ext.evaluation import published
from polycom_ext.evaluation import results as evaluation
from polycom_ext.report.rundir import Run
from polycom_ext.runs import adapter, record
from polycom_ext.runs import spec as run_spec
from polycom_ext.runs.record import STEP_SECONDS, TRAIN_LOSS, Series, mean

FINAL_SHARE = 0.1
"""Losses of single batches scatter: the final training loss is the mean of this last share of the values."""


@dataclass(frozen=True)
class Result:
    """One run and what it measured."""

    run: Run
    spec: run_spec.Spec
    target: int | None
    """Steps that the spec asks for."""
    label: str
    """The activation's title; the run's name too where a family has it twice."""

    @classmethod
    def of(cls, run: Run) -> Result:
        """Raises PolycomError where run.yaml is not a spec."""
        spec = run_spec.from_mapping(run.spec, str(record.Record(run.path).spec))
        entry, order = activations.parse(spec.activation)
        explicit = f" (order {order})" if order not in (None, activations.DEFAULT_ORDER) else ""
        return cls(run, spec, adapter.find(spec.trainer).total_steps(spec), entry.title + explicit)

    @property
    def order(self) -> int | None:
        """Of the polynomial; None for what is none."""
        return activations.parse(self.spec.activation)[1]

    @property
    def in_paper(self) -> str | None:
        """The activation's name, if the paper's tables are of it: they are all of one order."""
        order = published.load(self.facts.kind).order
        return self.spec.entry.name if self.order in (None, order) else None

    @cached_property
    def facts(self) -> adapter.Facts:
        """Model, batch and data."""
        return adapter.find(self.spec.trainer).facts(self.spec)

    @property
    def ffn_parameters(self) -> int | None:
        """Weights of all FFN matrices, all experts included; None where the spec does not tell."""
        width, facts = self.spec.matched_ffn_width, self.facts
        if width is None or facts.hidden is None or facts.layers is None:
            return None
        matrices = 3 if self.spec.entry.gated else 2
        return facts.layers * max(1, facts.experts) * matrices * facts.hidden * width

    @property
    def unfinished(self) -> bool:
        """Whether it logged fewer steps than its spec asks for."""
        return self.target is not None and self.run.step < self.target

    @property
    def progress(self) -> str:
        """`400`, or `250 of 400` for an unfinished run."""
        return f"{self.run.step} of {self.target}" if self.unfinished else str(self.run.step)

    @property
    def tokens(self) -> int | None:
        """Tokens seen so far."""
        return self.facts.tokens(self.run.step)

    @property
    def train(self) -> Series:
        """Training loss by step."""
        return self.run.metrics.get(TRAIN_LOSS, {})

    @property
    def train_loss(self) -> float | None:
        """Mean of the last tenth of the logged training losses."""
        values = list(self.train.values())
        return mean(values[-max(1, round(len(values) * FINAL_SHARE)) :]) if values else None

    @cached_property
    def losses(self) -> dict[str, Series]:
        """Validation loss by text and step; a text that was logged without a label is called `validation`."""
        losses = record.labelled(self.run.metrics, record.VALID, record.LOSS)
        return {label or "validation": series for label, series in losses.items()}

    @cached_property
    def accuracies(self) -> dict[str, Series]:
        """Accuracy while training, in percent, by task, under lm-eval's name, and step."""
        tasks = record.labelled(self.run.metrics, record.EVAL, record.ACCURACY)
        return {
            published.in_loop(task): {step: 100 * value for step, value in series.items()}
            for task, series in tasks.items()
        }

    @cached_property
    def evaluated(self) -> dict[str, dict[str, float]]:
        """What `polycom eval` measured: `accuracy`, in percent, by task, and `loss` by token file."""
        found = self.run.evaluation or {}
        scores = {name: evaluation.value(name, entry) for name, entry in found.get("tasks", {}).items()}
        return {
            "accuracy": {name: 100 * score for name, score in scores.items() if score is not None},
            "loss": {label: entry["loss"] for label, entry in found.get("tokens", {}).items()},
        }

    @cached_property
    def validation(self) -> Series:
        """Validation loss by step: the mean over the texts, at the steps at which all were evaluated."""
        return record.validation(self.run.metrics)

    @property
    def validation_loss(self) -> float | None:
        """The last one."""
        return last(self.validation)

    @property
    def perplexity(self) -> float | None:
        """exp of the last validation loss."""
        return None if self.validation_loss is None else perplexity(self.validation_loss)

    @property
    def step_seconds(self) -> float | None:
        """Median time of a step."""
        return self._median(STEP_SECONDS)

    @property
    def tokens_per_second(self) -> float | None:
        """Median."""
        return self._median(record.TOKENS_PER_SECOND)

    @property
    def mfu(self) -> float | None:
        """Median, 0 to 1; None where no peak of the devices is known."""
        return self._median(record.MFU)

    @property
    def peak_memory_bytes(self) -> float | None:
        """Of the device that has held the most."""
        return max(self.run.metrics.get(record.PEAK_MEMORY, {}).values(), default=None)

    def _median(self, name: str) -> float | None:
        values = self.run.metrics.get(name, {}).values()
        return median(values) if values else None

    @property
    def diverged_at(self) -> int | None:
        """First step with a loss that is not a finite number."""
        series = (self.train, *self.losses.values())
        steps = [step for one in series for step, value in one.items() if not math.isfinite(value)]
        return min(steps, default=None)


@dataclass(frozen=True)
class Family:
    """Runs that differ in activation and seed alone, in the registry's order: the first is the baseline."""

    results: list[Result]
    title: str
    slug: str

    @property
    def baseline(self) -> Result:
        """What differences are taken from."""
        return self.results[0]

    @property
    def facts(self) -> adapter.Facts:
        """Model, batch and data, the same for all."""
        return self.baseline.facts

    @property
    def published(self) -> published.Published:
        """What the paper says of this kind of model."""
        return published.load(self.facts.kind)

    @property
    def tokens(self) -> int | None:
        """Training tokens of the longest run."""
        return max((one.tokens for one in self.results if one.tokens is not None), default=None)

    @property
    def best(self) -> Result | None:
        """Lowest validation loss among the runs that came furthest; None where they are fewer than two."""
        step = max((max(one.validation) for one in self.results if one.validation), default=None)
        rivals = [one for one in self.results if math.isfinite(one.validation.get(step or 0, math.nan))]
        return min(rivals, key=lambda one: one.validation[step or 0]) if len(rivals) > 1 else None

    @property
    def rehearsal(self) -> bool:
        """Whether any run has a smaller model or fewer tokens than the paper's."""
        return not all(self.published.same_conditions(one.facts, one.run.step) for one in self.results)


def last(series: Series) -> float | None:
    """The value of the last step."""
    return series[max(series)] if series else None


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is no float."""
    return math.exp(loss) if not loss > 700 else math.inf


def common_steps(result: Result, baseline: Result) -> list[int]:
    """Steps at which both have a validation loss."""
    return sorted(set(result.validation) & set(baseline.validation))


def families(runs: Sequence[Run]) -> list[Family]:
    """Group runs by everything in their specs but activation and seed; dense models first."""
    groups: dict[str, list[Result]] = {}
    keys: dict[str, dict[str, Any]] = {}
    for result in map(Result.of, runs):
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
        made.append(Family(_label(group), titles[key] + distinction, slug))
    return sorted(made, key=lambda family: (family.facts.kind, family.title))


def _settings(result: Result) -> dict[str, Any]:
    """The spec, flattened, without its name, activation and seed, and paths through a folder of that name."""
    trainer = adapter.find(result.spec.trainer)
    left_out = ("name", "activation", "sources", f"{trainer.section}.{trainer.seed}")
    return {
        key: value
        for key, value in _flatten(result.spec.as_mapping()).items()
        if key.partition(".")[0] not in left_out
        and key not in left_out
        and not (isinstance(value, str) and result.run.name in PurePath(value).parts)
    }


def _flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
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


def _label(group: list[Result]) -> list[Result]:
    """In the registry's order, then by polynomial order; a title that occurs twice gets the run's name."""
    order = activations.names()
    titles = [result.label for result in group]
    labelled = [
        replace(result, label=f"{result.label} · {result.run.name}")
        if titles.count(result.label) > 1
        else result
        for result in group
    ]
    return sorted(labelled, key=lambda one: (order.index(one.spec.entry.name), one.order or 0, one.run.name))
