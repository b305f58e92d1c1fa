"""The numbers of a report: one result a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from polycom_ext import activations
from polycom_ext.evaluation import published
from polycom_ext.runs import adapter, record
from polycom_ext.runs import spec as run_spec

SETTINGS = {
    "lm_eval": "lm-eval {}",
    "data": "data: {}",
    "limit": "the first {} documents of a task only",
    "num_fewshot": "{} examples",
}
"""What a task's number depends on besides the checkpoint -> how it is said."""
FINAL_SHARE = 0.1
"""Losses of single batches scatter: the final training loss is the mean of this last share of the values."""


@dataclass(frozen=True)
class Result:
    """What one run directory holds, and what that says."""

    path: Path
    name: str
    spec: run_spec.Spec
    resolved: dict[str, Any]
    """The spec as it is written."""
    metrics: dict[str, record.Series]
    coefficients: dict[str, Any] | None
    analysis: dict[str, Any] | None
    evaluated: dict[str, dict[str, float]]
    """What `polycom eval` measured of the last checkpoint: accuracy in percent by `task`, loss by `text`."""
    settings: list[dict[str, str]]
    """Of each of its tasks, by the names of SETTINGS."""
    versions: dict[str, Any]
    attempts: list[dict[str, Any]]
    """When the trainer was started and ended, and with what exit status."""
    command: str
    last_logged: datetime
    problems: list[str]
    """What of it is damaged, and left out: sentences."""

    @property
    def step(self) -> int:
        """The last step of which anything was logged."""
        return max(max(series) for series in self.metrics.values())

    @cached_property
    def target(self) -> int | None:
        """Steps that the spec asks for."""
        return adapter.find(self.spec.trainer).total_steps(self.spec)

    @property
    def title(self) -> str:
        """Of the activation and its order."""
        usual = self.order in (None, activations.DEFAULT_ORDER)
        return self.spec.entry.title + ("" if usual else f" (order {self.order})")

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
        return self.target is not None and self.step < self.target

    @property
    def progress(self) -> str:
        """`400`, or `250 of 400` for an unfinished run."""
        return f"{self.step} of {self.target}" if self.unfinished else str(self.step)

    @cached_property
    def curves(self) -> dict[str, pd.Series]:
        """By name and step; what is not finite is infinite.

        train; validation, the mean over the texts; perplexity; text/LABEL; in percent task/NAME, by lm-eval's
        name, and accuracy, their mean.
        """
        metrics = self.metrics
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
        seconds = pd.Series(self.metrics.get(record.STEP_SECONDS, {}), dtype=float)
        return seconds[np.isfinite(seconds) & (seconds >= 0)]

    @cached_property
    def hours(self) -> pd.Series:
        """Of training until each logged step: the sum of the steps' times, without evaluation and saving."""
        steps = np.diff(self.seconds.index.to_numpy(dtype=float), prepend=0.0)
        return (self.seconds * steps).cumsum() / 3600

    @cached_property
    def numbers(self) -> dict[str, float | int | None]:
        """What a table shows of the whole run."""
        train = self.curves.get("train", pd.Series(dtype=float))
        last = train.tail(max(1, round(len(train) * FINAL_SHARE)))
        rates = {"tokens_per_second": record.TOKENS_PER_SECOND, "mfu": record.MFU}
        shown = {name: pd.Series(self.metrics.get(metric), dtype=float) for name, metric in rates.items()}
        medians = {name: one.median() for name, one in {"step_seconds": self.seconds, **shown}.items()}
        return {
            "tokens": self.facts.tokens(self.step),
            "train_loss": last.mean(),
            "validation_loss": self.final("validation"),
            "validation_perplexity": self.final("perplexity"),
            **medians,
            "peak_memory_bytes": max(self.metrics.get(record.PEAK_MEMORY, {}).values(), default=None),
        }

    @property
    def diverged_at(self) -> int | None:
        """First step with a loss that is not a finite number."""
        losses = [one for name, one in self.curves.items() if name[:5] in ("train", "text/")]
        return min((int(step) for one in losses for step in one.index[np.isinf(one)]), default=None)
