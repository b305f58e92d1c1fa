"""From what a user names to a folder of Hugging Face that can be evaluated, and to where its numbers go."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polycom_ext.checkpoints.command import convert, opened
from polycom_ext.checkpoints.forms import Options
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
        source, step = Path(opened(path).source), plan.recorded(path).latest_step()
        return Checkpoint(source, output or record.evaluations / source.name, name, step)
    if output is None:
        raise PolycomError(f"{path} is no run's directory: say with --output where its numbers are to go")
    return Checkpoint(path if _is_model(path) else Path(opened(path).source), output, name)


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
            convert(one.source, model, "hf", Options(tokenizer=tokenizer))
        results.begin(
            one.output,
            {"checkpoint": str(one.source), "step": one.step, **_what(one.folder)}
            | {"fingerprint": fingerprint},
        )
        yield


def _what(folder: Path) -> dict[str, Any]:
    """Activation and kind, as the paper's tables have them; nothing of a model that cannot be read here."""
    try:
        config = opened(folder).config
    except PolycomError:
        return {"activation": None, "kind": None}
    return {"activation": config["activation"]["name"], "kind": "moe" if config["num_experts"] else "dense"}


def _is_model(path: Path) -> bool:
    return (path / CONFIG).is_file() and not Record(path).spec.is_file()
