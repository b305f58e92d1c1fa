"""The record of a run: the files of its directory, the metrics and coefficients in them, its attempts.

Each name stands here once. Trainer entries and what starts them write by it, report and status read by it;
none of them should have to wait for torch, so nothing here imports it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any, BinaryIO

import yaml

from polycom_ext.errors import PolycomError
from polycom_ext.files import write_text
from polycom_ext.runs import document

TRAIN_LOSS = "train/loss"
GRAD_NORM = "train/grad_norm"
LEARNING_RATE = "train/learning_rate"
STEP_SECONDS = "train/step_seconds"
"""Of one step; the mean where a line stands for several."""
TOKENS_PER_SECOND = "train/tokens_per_second"
"""Of all devices together."""
MFU = "train/mfu"
"""Model FLOP/s as a share of the devices' peak, 0 to 1; see `runs.efficiency`."""
PEAK_MEMORY = "train/peak_memory_bytes"
"""Of the device that has held the most so far."""
LOAD_BALANCING_LOSS = "train/load_balancing_loss"
Z_LOSS = "train/z_loss"
ROUTER_Z_LOSS = "train/router_z_loss"
VALID, TEST, EVAL = "valid", "test", "eval"
"""What is evaluated, not trained: `valid/TEXT/loss`, or `valid/loss` of a text without label;
`eval/TASK/acc`."""
LOSS, ACCURACY = "loss", "acc"

EVALUATION = "results.json"
"""What was measured of one checkpoint, as `evaluation/results.py` writes it."""

LARGEST = 1e100
"""Sums and differences of values up to this are finite; no loss and no time is larger."""

Series = dict[int, float]
"""step -> value, ascending"""


class Record:
    """The files of one run directory, and what is noted in them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec = path / "run.yaml"
        """The resolved spec."""
        self.site = path / "site.yaml"
        """What the place where it runs has asked for, resolved."""
        self.job = path / "job.json"
        """To whom it was handed over last."""
        self.command = path / "command.sh"
        self.versions = path / "versions.json"
        """Versions of what runs, states of the upstream trees, and the attempts."""
        self.log = path / "log.txt"
        """All that the trainer says. Who works in the directory holds its lock."""
        self.job_log = path / "job.txt"
        """What the job system and the nodes say, of all starts one after the other."""
        self.metrics = path / "metrics.jsonl"
        """A JSON line a logged step, of its `step` and its `metrics` by name."""
        self.coefficients = path / "coefficients.json"
        """What `coefficients` makes, of the last step."""
        self.analysis = path / "analysis.json"
        """What `polycom analyze` found in its newest checkpoint."""
        self.bandwidth = path / "bandwidth.json"
        """What `runs.bandwidth` measured between the nodes, where a site asks for it."""
        self.efficiency = path / "efficiency.json"
        """What `runs.efficiency` reckons MFU from."""
        self.checkpoints = path / "checkpoints"
        self.evaluations = path / "evaluations"
        """What `polycom eval` has measured: a folder a checkpoint, with EVALUATION in it."""
        self.refusal = path / "refusal.txt"
        """Why a trainer refused to run: one sentence."""

    def absent(self, rank: int | str) -> Path:
        """Why a node will not come to the others; see `runs.absent`."""
        return self.path / f"absent.node-{rank}.txt"

    def read_spec(self) -> dict[str, Any]:
        """The resolved spec as a mapping. Raises PolycomError where there is none or it cannot be read."""
        if not self.spec.is_file():
            raise PolycomError(
                f"{self.path} is not a run directory: it has no {self.spec.name} (`polycom run` writes one)"
            )
        spec = _parse(self.spec, document.load, yaml.YAMLError)
        for key in ("trainer", "activation"):
            if not isinstance(spec.get(key), str):
                raise PolycomError(f"{self.spec} names no {key}")
        return spec

    def read_command(self) -> str:
        """What started the trainer last, nothing if it is not there."""
        return self.command.read_text("utf-8", "replace").strip() if self.command.exists() else ""

    def read_versions(self) -> dict[str, Any]:
        """All of versions.json, nothing if it is not there. Raises PolycomError if it cannot be read."""
        return _parse(self.versions) if self.versions.is_file() else {}

    def read_coefficients(self) -> dict[str, Any] | None:
        """What was learned, None if it is not there. Raises PolycomError if it cannot be read."""
        return _parse(self.coefficients) if self.coefficients.is_file() else None

    def read_bandwidth(self) -> dict[str, Any]:
        """What was measured between the nodes. Raises PolycomError if it cannot be read."""
        return _parse(self.bandwidth)

    def read_analysis(self) -> dict[str, Any] | None:
        """What was found in the newest checkpoint, None if nobody looked. Raises PolycomError if torn."""
        return _parse(self.analysis) if self.analysis.is_file() else None

    def write_analysis(self, study: Mapping[str, Any]) -> None:
        """Write what `polycom analyze` has found."""
        write_text(self.analysis, json.dumps(study, indent=2) + "\n")

    def read_efficiency(self) -> dict[str, Any] | None:
        """What MFU is reckoned from, None if it is not there. Raises PolycomError if it cannot be read."""
        return _parse(self.efficiency) if self.efficiency.is_file() else None

    def read_evaluation(self) -> dict[str, Any] | None:
        """What was measured of the last checkpoint that was evaluated, None if none was.

        Raises PolycomError if it cannot be read.
        """
        found = [_parse(path) for path in sorted(self.evaluations.glob(f"*/{EVALUATION}"))]
        return max(found, key=lambda one: one.get("step") or 0, default=None)

    def write_coefficients(self, learned: Mapping[str, Any]) -> None:
        """Write what `coefficients` has made."""
        write_text(self.coefficients, json.dumps(learned, indent=2) + "\n")

    def read_job(self) -> dict[str, Any] | None:
        """Who has the run: the `backend`, and what that one noted; None where it was never handed over.

        Raises PolycomError if it cannot be read.
        """
        return _parse(self.job) if self.job.is_file() else None

    def write_job(self, job: Mapping[str, Any]) -> None:
        """Note who has the run now."""
        write_text(self.job, json.dumps(job, indent=2) + "\n")

    def attempts(self) -> list[dict[str, Any]]:
        """What was noted of each time that the trainer was started, the first one first.

        started: when, as are all times in ISO 8601 with the offset from UTC
        from_step: of the checkpoint that it went on from; None for a start from scratch
        host, pid: the process that watches it

        and once it has ended:

        ended: when
        status: exit status of the worker that failed first, negative for a signal; 0 if all went well
        signal: the number of the one by which it was told to stop, None if by none
        refusal: the sentence with which it refused to run, None if it ran
        complete: whether the last step is saved, and all went well after it
        cause: of a run on several nodes the one that ended it for all, a sentence; None if none did

        Raises PolycomError where they cannot be read.
        """
        try:
            return [dict(one) for one in json.loads(self.versions.read_text(encoding="utf-8"))["attempts"]]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError):
            raise PolycomError(
                f"{self.versions} cannot be read as the versions and attempts of a run; "
                "move it away to go on without the attempts before"
            ) from None

    def begin_attempt(self, log: BinaryIO, from_step: int | None) -> None:
        """Note, in the log too, that the trainer is started; an earlier refusal is none of this attempt."""
        self.refusal.unlink(missing_ok=True)
        began = {"started": _now(), "from_step": from_step, "host": platform.node(), "pid": os.getpid()}
        attempts = [*self.attempts(), began]
        self._write_attempts(attempts)
        log.write(f"==== {began['started']}: attempt {len(attempts)} ====\n".encode())
        log.flush()

    def end_attempt(
        self,
        status: int,
        *,
        signal: int | None = None,
        complete: bool = False,
        cause: str | None = None,
    ) -> None:
        """Note how the attempt that was begun last has ended, with its refusal if it left one."""
        *earlier, last = self.attempts()
        ended = {"ended": _now(), "status": status, "signal": signal, "refusal": self.read_refusal()}
        self._write_attempts([*earlier, {**last, **ended, "complete": complete, "cause": cause}])

    def read_refusal(self) -> str | None:
        """The sentence with which this attempt's trainer has refused to run."""
        with contextlib.suppress(FileNotFoundError):
            return self.refusal.read_text(encoding="utf-8", errors="replace").strip()
        return None

    def _write_attempts(self, attempts: Sequence[Mapping[str, Any]]) -> None:
        versions = json.loads(self.versions.read_text(encoding="utf-8"))
        write_text(self.versions, json.dumps({**versions, "attempts": attempts}, indent=2) + "\n")


def refuse(run_dir: Path, sentence: str) -> None:
    """Record why the trainer will not run; called by the worker that refuses, before it exits with status 2.

    All ranks may call it: the first sentence stays, and is there whole or not at all.
    """
    path = Record(run_dir).refusal
    scratch = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    write_text(scratch, " ".join(sentence.split()) + "\n")
    try:
        os.link(scratch, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        scratch.replace(path)
    scratch.unlink(missing_ok=True)


def evaluated(split: str, label: str, what: str) -> str:
    """The name of an evaluation's value: ("valid", "c4", "loss") -> `valid/c4/loss`; label may be empty."""
    return "/".join(filter(None, (split, label, what)))


def label_of(name: str, split: str, what: str) -> str | None:
    """The label in a name that `evaluated(split, label, what)` makes; None for another name."""
    if name.startswith(f"{split}/") and name.endswith(f"/{what}"):
        return name[len(split) + 1 : -len(what) - 1]
    return None


def append(path: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Add one line to a file of metrics."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "metrics": metrics}) + "\n")


def parse(line: bytes) -> tuple[int, dict[str, float]] | None:
    """The step and the values of a line of metrics; None for one that holds none.

    A killed process may leave a line half-written. What is too large to reckon with is infinite.
    """
    try:
        record = json.loads(line.decode("utf-8", errors="replace"))
        step = int(record["step"])
        if not 0 <= step < 2**53:
            raise ValueError
        return step, {str(name): _number(value) for name, value in record["metrics"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


@dataclass(frozen=True)
class Metrics:
    """What a file of metrics holds, its attempts merged."""

    series: dict[str, Series]
    """By name."""
    step: int | None
    """Of the last line; an earlier attempt may have come further."""
    unreadable_lines: int
    """Lines that hold no record: a killed process may leave one half-written."""


def read_metrics(path: Path) -> Metrics:
    """Read a file of metrics; it holds nothing if it is not there.

    Of several values of one name at one step, the last counts; but of evaluations the first, because a
    trainer evaluates once more after its last step, on other batches. Where steps go back, or a step is
    trained again, a run was resumed from before it: evaluations from there on count anew.
    """
    series: dict[str, Series] = {}
    unreadable, at = 0, -1
    settled: set[tuple[str, int]] = set()
    lines: list[bytes] = []
    with contextlib.suppress(FileNotFoundError):
        lines = path.read_bytes().splitlines()
    for line in filter(bytes.strip, lines):
        record = parse(line)
        if record is None:
            unreadable += 1
            continue
        step, values = record
        if step < at or (TRAIN_LOSS in values and step in series.get(TRAIN_LOSS, {})):
            settled = {(name, earlier) for name, earlier in settled if earlier < step}
        at = step
        for name, value in values.items():
            if (name, step) not in settled:
                series.setdefault(name, {})[step] = value
            if name.partition("/")[0] in (VALID, TEST, EVAL):
                settled.add((name, step))
    ascending = {name: dict(sorted(values.items())) for name, values in series.items()}
    return Metrics(ascending, at if series else None, unreadable)


def labelled(metrics: Mapping[str, Series], split: str, what: str) -> dict[str, Series]:
    """{label: series} of all `evaluated(split, label, what)` that there are."""
    labels = {label_of(name, split, what): series for name, series in metrics.items()}
    return {label: series for label, series in labels.items() if label is not None}


def validation(metrics: Mapping[str, Series]) -> Series:
    """Validation loss by step: the mean over the texts, at the steps at which all were evaluated."""
    losses = labelled(metrics, VALID, LOSS).values()
    common = set.intersection(*map(set, losses)) if losses else ()
    return {step: mean([series[step] for series in losses]) for step in sorted(common)}


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; not a number where infinities of both signs meet."""
    try:
        return fmean(values)
    except ValueError:
        return math.nan


def coefficients(
    step: int, activation: str, layers: Iterable[tuple[str, Mapping[str, list[float]]]]
) -> dict[str, Any]:
    """What the activations have learned by a step, as coefficients.json holds it.

    Args:
        activation: as the spec names it.
        layers: (name of the module, {name of a parameter: its values}), in the model's order.

    Returns: {"step": …, "activation": …, "layers": [{"name": …, PARAMETER: [floats], …}, …]}
    """
    return {
        "step": step,
        "activation": activation,
        "layers": [{"name": name, **parameters} for name, parameters in layers],
    }


def parameters(layer: Mapping[str, Any]) -> dict[str, list[float]]:
    """{name of a parameter: its values} of one of the `layers` that `coefficients` makes."""
    return {key: values for key, values in layer.items() if key != "name"}


def _parse(path: Path, parse: Any = json.loads, error: type[Exception] = ValueError) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (error, UnicodeDecodeError) as problem:
        raise PolycomError(f"{path} cannot be read: {problem}") from problem
    if not isinstance(content, dict):
        raise PolycomError(f"{path} cannot be read: it holds no mapping")
    return content


def _number(value: Any) -> float:
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if value > 0 else -math.inf
    return math.copysign(math.inf, number) if abs(number) > LARGEST else number


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
