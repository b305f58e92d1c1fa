"""From a checkpoint to what is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polycom_ext import trainers
from polycom_ext.checkpoints.command import convert
from polycom_ext.checkpoints.forms import Options, Reads
from polycom_ext.checkpoints.model import Model
from polycom_ext.evaluation import results, sources


def test_a_checkpoint_is_opened_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "olmo"
    convert(model, checkpoint, "olmo", Options())
    opened: list[Path] = []

    def heard(read: Any) -> Any:
        def reading(self: object, path: Path) -> Model:
            opened.append(path)
            result: Model = read(self, path)
            return result

        return reading

    for form in trainers.checkpoint_forms().values():
        if isinstance(form, Reads):
            monkeypatch.setattr(type(form), "read", heard(type(form).read))
    one = sources.find(checkpoint, tmp_path / "numbers")
    with sources.prepared(one, None):
        told = results.read(one.output)
    assert [path.parent for path in opened] == [checkpoint]
    assert told is not None
    assert (told["activation"], told["kind"]) == ("polynorm", "dense")
    assert (one.folder / "config.json").is_file()
