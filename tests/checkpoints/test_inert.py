"""What a pickle names is not run, and what it says is still read."""

from __future__ import annotations

import argparse
import enum
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from polycom_ext.checkpoints import inert
from polycom_ext.errors import PolycomError


class Colour(enum.Enum):
    RED = 1


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def saved(value: Any, path: Path, form: str) -> Path:
    if form == "torch":
        torch.save(value, path)
    else:
        path.write_bytes(pickle.dumps(value))
    return path


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_nothing_that_a_pickle_names_is_run(form: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = saved({"lr": 0.1, "evil": Malicious(f"touch {canary}")}, tmp_path / "file", form)
    read = inert.load(path)
    assert not canary.exists()
    assert read["lr"] == 0.1
    assert read["evil"].path in ("posix.system", "nt.system")
    if form == "pickle":  # the file is as bad as it should be
        pickle.loads(path.read_bytes())
        assert canary.exists()


def test_what_it_says_is_read(tmp_path: Path) -> None:
    settings = argparse.Namespace(layers=4, names=["a"], colour=Colour.RED, dtype=torch.bfloat16)
    read = inert.load(saved({"args": settings, "weight": torch.ones(3)}, tmp_path / "common.pt", "torch"))
    assert (read["args"].layers, read["args"].names) == (4, ["a"])
    assert read["args"].colour.arguments == (1,)
    assert read["args"].dtype.path == "torch.bfloat16"
    assert read["weight"].path == "torch._utils._rebuild_tensor_v2"


@pytest.mark.parametrize("form", ["torch", "pickle"])
@pytest.mark.parametrize("damage", ["empty", "half", "other", "missing"])
def test_a_file_that_cannot_be_read_is_named(form: str, damage: str, tmp_path: Path) -> None:
    path = saved(list(range(1000)), tmp_path / "common.pt", form)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "other": b"hello"}[damage])
    with pytest.raises(PolycomError, match=r"common\.pt"):
        inert.load(path)
