"""From what a user names to a folder of Hugging Face that can be evaluated, and to where its numbers go."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polycom_ext.checkpoints.command import convert, opened
from polycom_ext.checkpoints.forms import Options
from polycom_ext.checkpoints.model import Model
from polycom_ext.errors import PolycomError
from polycom_ext.evaluation import results
from polycom_ext.files import exclusive
from polycom_ext.runs import plan
from polycom_ext.runs.record import Record

CONFIG = "config.json"
MODEL = "model"
"""The converted checkpoint, beside its numbers: made once, and anew where the checkpoint is another."""


@dataclass(frozen=True)
class Checkpoint:
    """One that is to be evaluated."""

    source: Path
    """A checkpoint of a trainer's, or a folder of Hugging Face."""
    output: Path
    name: str
    step: int | None = None
    model: Model | None = None
    """What the source holds; None of a folder whose model cannot be read here."""

    @property
    def is_model(self) -> bool:
        return _is_model(self.source)

    @property
    def folder(self) -> Path:
        """Of Hugging Face."""
        return self.source if self.is_model else self.output / MODEL


def find(path: Path, output: Path | None) -> Checkpoint:
    """What a path stands for. Raises PolycomError for one that is none, or has no place for its numbers."""
    if not path.is_dir():
        raise PolycomError(f"{path} is no folder: name a run's directory, a checkpoint, or a model's folder")
    record, name = Record(path), path.resolve().name
    if record.spec.is_file():
        model, step = opened(path), plan.recorded(path).latest_step()
        source = Path(model.source)
        return Checkpoint(source, output or record.evaluations / source.name, name, step, model)
    if output is None:
        raise PolycomError(f"{path} is no run's directory: say with --output where its numbers are to go")
    if not _is_model(path):
        model = opened(path)
        return Checkpoint(Path(model.source), output, name, model=model)
    with suppress(PolycomError):
        return Checkpoint(path, output, name, model=opened(path))
    return Checkpoint(path, output, name)


@contextmanager
def prepared(one: Checkpoint, tokenizer: Path | None) -> Iterator[None]:
    """Hold the place of its numbers, with the model converted where that is needed."""
    with exclusive(one.output):
        kept, model = results.read(one.output), one.output / MODEL
        fingerprint = results.fingerprint(one.source)
        if kept is not None and kept.get("fingerprint") != fingerprint:
            print(f"{one.name}: {one.source} is another than was evaluated before, so all is measured anew")
            shutil.rmtree(model, ignore_errors=True)
        if not one.is_model and not model.exists():
            convert(one.model or one.source, model, "hf", Options(tokenizer=tokenizer))
        results.begin(
            one.output,
            {"checkpoint": str(one.source), "step": one.step, **_what(one.model)}
            | {"fingerprint": fingerprint},
        )
        yield


def _what(model: Model | None) -> dict[str, Any]:
    """Activation and kind, as the paper's tables have them."""
    if model is None:
        return {"activation": None, "kind": None}
    config = model.config
    return {"activation": config["activation"]["name"], "kind": "moe" if config["num_experts"] else "dense"}


def _is_model(path: Path) -> bool:
    return (path / CONFIG).is_file() and not Record(path).spec.is_file()
