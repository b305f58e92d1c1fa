"""The numbers of a report: one result a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from polycom_ext import activations
from polycom_ext.evaluation import published
from polycom_ext.evaluation import results as evaluation
from polycom_ext.report.rundir import DAMAGE, Run
from polycom_ext.runs import adapter, record
from polycom_ext.runs import spec as run_spec

FINAL_SHARE = 0.1
"""Losses of single batches scatter: the final training loss is the mean of this last share of the values."""


@dataclass(frozen=True)
class Result:
    """One run and what it measured."""

    run: Run
    spec: run_spec.Spec
    target: int | None
    """Steps that the spec asks for."""
    title: str
    """Of the activation and its order."""

    @classmethod
    def of(cls, run: Run) -> Result:
        """Raises PolycomError where run.yaml is not a spec; leaves out an evaluation that is none."""
        spec = run_spec.from_mapping(run.spec, str(record.Record(run.path).spec))
        entry, order = activations.parse(spec.activation)
        explicit = f" (order {order})" if order not in (None, activations.DEFAULT_ORDER) else ""
        target, title = adapter.find(spec.trainer).total_steps(spec), entry.title + explicit
        result = cls(run, spec, target, title)
        try:
            _ = result.evaluated, result.settings
        except DAMAGE as error:
            problem = f"{run.path}: its evaluation is left out, as it cannot be understood: {error!r}"
            return cls(replace(run, evaluation=None, problems=[*run.problems, problem]), spec, target, title)
        return result

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

    @cached_property
    def curves(self) -> dict[str, pd.Series]:
        """By name and step; what is not finite is infinite.

        train; validation, the mean over the texts; perplexity; text/LABEL; in percent task/NAME, by lm-eval's
        name, and accuracy, their mean.
        """
        metrics = self.run.metrics
        found = {"train": metrics.get(record.TRAIN_LOSS, {}), "validation": record.validation(metrics)}
        for label, series in record.labelled(metrics, record.VALID, record.LOSS).items():
            found[f"text/{label or 'validation'}"] = series
        for task, series in record.labelled(metrics, record.EVAL, record.ACCURACY).items():
            found[f"task/{published.in_loop(task)}"] = {step: 100 * value for step, value in series.items()}
        made = {name: pd.Series(series, dtype=float) for name, series in found.items() if series}
        made = {name: one.where(np.isfinite(one), math.inf) for name, one in made.items()}
        tasks = pd.DataFrame({name: one for name, one in made.items() if name[:5] == "task/"}).dropna()
        if "validation" in made:
            with np.errstate(over="ignore"):
                made["perplexity"] = np.exp(made["validation"])
        return made if tasks.empty else {**made, "accuracy": tasks.mean(axis=1)}

    def final(self, name: str) -> float | None:
        """The last value of a curve; None where there is none."""
        return float(self.curves[name].iloc[-1]) if name in self.curves else None

    @property
    def last_evaluation(self) -> int:
        """The last step that has a validation loss; 0 where none has."""
        return int(self.curves["validation"].index[-1]) if "validation" in self.curves else 0

    @cached_property
    def seconds(self) -> pd.Series:
        """Of a step, by step."""
        seconds = pd.Series(self.run.metrics.get(record.STEP_SECONDS, {}), dtype=float)
        return seconds[np.isfinite(seconds) & (seconds >= 0)]

    @property
    def slowed(self) -> float:
        """Share of the training's time that its steps took beyond their median."""
        return 1 - self.seconds.median() / self.seconds.mean() if self.seconds.sum() else 0.0

    @cached_property
    def hours(self) -> pd.Series:
        """Of training until each logged step: the sum of the steps' times, without evaluation and saving."""
        steps = np.diff(self.seconds.index.to_numpy(dtype=float), prepend=0.0)
        return (self.seconds * steps).cumsum() / 3600

    @cached_property
    def evaluated(self) -> dict[str, dict[str, float]]:
        """What `polycom eval` measured: `task`, accuracy in percent, and `text`, the loss by token file."""
        found = self.run.evaluation or {}
        scores = {name: evaluation.value(name, entry) for name, entry in found.get("tasks", {}).items()}
        return {
            "task": {name: 100 * float(score) for name, score in scores.items() if score is not None},
            "text": {label: float(entry["loss"]) for label, entry in found.get("tokens", {}).items()},
        }

    @cached_property
    def settings(self) -> list[dict[str, str]]:
        """Of each task that `polycom eval` measured: lm_eval (its version), data, limit, num_fewshot."""
        told = [entry["settings"] for entry in (self.run.evaluation or {}).get("tasks", {}).values()]
        names = ("lm_eval", "data", "limit", "num_fewshot")
        return [{name: str(one[name]) for name in names if one[name] is not None} for one in told]

    @cached_property
    def numbers(self) -> dict[str, float | int | None]:
        """What a table shows of the whole run."""
        train = self.curves.get("train", pd.Series(dtype=float))
        last = train.tail(max(1, round(len(train) * FINAL_SHARE)))
        rates = {"tokens_per_second": record.TOKENS_PER_SECOND, "mfu": record.MFU}
        shown = {name: pd.Series(self.run.metrics.get(metric), dtype=float) for name, metric in rates.items()}
        medians = {name: one.median() for name, one in {"step_seconds": self.seconds, **shown}.items()}
        return {
            "tokens": self.facts.tokens(self.run.step),
            "train_loss": last.mean(),
            "validation_loss": self.final("validation"),
            "validation_perplexity": self.final("perplexity"),
            **medians,
            "peak_memory_bytes": max(self.run.metrics.get(record.PEAK_MEMORY, {}).values(), default=None),
        }

    @property
    def diverged_at(self) -> int | None:
        """First step with a loss that is not a finite number."""
        losses = [one for name, one in self.curves.items() if name[:5] in ("train", "text/")]
        return min((int(step) for one in losses for step in one.index[np.isinf(one)]), default=None)
