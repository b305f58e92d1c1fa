"""The tokenizer of a run: that of the token files on which it trained, as far as they know it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from polycom_ext.checkpoints.model import Model
from polycom_ext.data.token_files import tokenizer
from polycom_ext.errors import PolycomError
from polycom_ext.runs import adapter, spec
from polycom_ext.runs.record import Record


@dataclass(frozen=True)
class Tokenizer:
    """What writes a model's tokens."""

    path: Path | None
    """A tokenizer.json; None where the one that made the token files is not there any more."""
    eos_id: int
    """Ends a document."""


def of_checkpoint(checkpoint: Path) -> Tokenizer | None:
    """That of the run whose checkpoint it is; None where there is no run, or its token files know none."""
    for folder in checkpoint.resolve().parents[:2]:
        record = Record(folder)
        if record.spec.is_file():
            with contextlib.suppress(
                PolycomError, OSError
            ):  # the checkpoint is to be read without its run too
                resolved = spec.from_mapping(record.read_spec(), str(record.spec))
                for data in adapter.find(resolved.trainer).facts(resolved).data:
                    found = tokenizer(data)
                    if found is not None:
                        return Tokenizer(*found)
    return None


def added(model: Model, checkpoint: Path) -> Model:
    """The model of a checkpoint, with the tokenizer of its run, and the token that ends a document."""
    found = of_checkpoint(checkpoint)
    if found is None:
        return model
    config = dict(model.config)
    if config.get("eos_token_id") is None:
        config["eos_token_id"] = found.eos_id
    files = {} if found.path is None else {"tokenizer.json": found.path}
    return replace(model, config=config, files={**model.files, **files})
