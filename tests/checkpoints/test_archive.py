"""Files of torch.save: the tensors that torch would read, one at a time, and nothing run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polycom_ext.checkpoints.archive import Archive
from polycom_ext.errors import PolycomError

WHOLE = torch.arange(24.0)
TENSORS: dict[str, torch.Tensor] = {
    "whole": WHOLE,
    "part of another": WHOLE[5:9],
    "transposed": WHOLE.view(4, 6)[1:].t(),
    "parameter": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
    "integers": torch.arange(10)[4:7],
    "none": torch.empty(0, 3),
    "one": torch.tensor(3.0, dtype=torch.float64),
}


class Command:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with_attribute = torch.ones(4)
    with_attribute.note = "kept by torch.save"  # type: ignore[attr-defined]
    content: dict[str, Any] = {**TENSORS, "with attribute": with_attribute, "code": Command()}
    torch.save(content, tmp_path / "saved.pt")
    return tmp_path / "saved.pt"


def test_a_tensor_is_the_one_that_was_saved(saved: Path) -> None:
    archive = Archive(saved)
    for name, tensor in {**TENSORS, "with attribute": torch.ones(4)}.items():
        read = archive.tensor(archive.content[name])
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), name


def test_nothing_is_run(saved: Path) -> None:
    archive = Archive(saved)
    archive.tensor(archive.content["whole"])
    with pytest.raises(PolycomError, match=r"saved.pt holds \S*system where a tensor is expected"):
        archive.tensor(archive.content["code"])
    assert not Path("ran").exists()


def test_a_bit_that_flipped_is_noticed(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[data.find(WHOLE.numpy().tobytes()) + 9] ^= 1
    saved.write_bytes(data)
    archive = Archive(saved)
    with pytest.raises(PolycomError, match=r"saved.pt cannot be read: Bad CRC"):
        archive.tensor(archive.content["whole"])


def test_a_file_cut_short_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(PolycomError, match=r"saved.pt cannot be read"):
        Archive(saved)
