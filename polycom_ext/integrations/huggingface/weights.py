"""The tensors of a folder of Hugging Face, each read when it is asked for; nothing of a pickle is run."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polycom_ext.errors import PolycomError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class Weights:
    """Those of a folder: of `model.safetensors` or its shards, else of `pytorch_model.bin` or its shards.

    One file is open at a time. Raises PolycomError where there are none, and for a file that is missing, cut
    short, or holds anything but tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: tuple[str, Any] = ("", None)
        for single, index in ((SINGLE, INDEX), (PICKLED, PICKLED_INDEX)):
            if (folder / single).is_file():
                self.files: Mapping[str, str] = dict.fromkeys(self._file(single).keys(), single)
                return
            if (folder / index).is_file():
                self.files = self._indexed(index)
                return
        raise PolycomError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}")

    def read(self, name: str) -> Tensor:
        """The tensor of that name, one of `files`."""
        file = self.files[name]
        opened = self._file(file)
        try:
            tensor: Tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        except Exception as error:  # safetensors raises its own, and what it stumbles over
            raise _unreadable(self.folder / file, error) from None
        return tensor

    def _indexed(self, index: str) -> dict[str, str]:
        """Name -> file, as the index says and the files confirm."""
        path = self.folder / index
        try:
            held_by = dict(json.loads(path.read_bytes())["weight_map"])
            named = {name: str(file) for name, file in held_by.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unreadable(path, error) from None
        for file in sorted(set(named.values())):
            if Path(file).name != file:
                raise PolycomError(f"{path} names {file}, which is no file beside it")
            if not (self.folder / file).is_file():
                raise PolycomError(f"{self.folder} lacks {file}, which {index} names")
            held = set(self._file(file).keys())
            gone = min((name for name, at in named.items() if at == file and name not in held), default=None)
            if gone is not None:
                raise PolycomError(f"{self.folder / file} lacks {gone}, which {index} says is there")
        return named

    def _file(self, name: str) -> Any:
        if self._open[0] != name:
            path = self.folder / name
            self._open = ("", None)  # before the next is opened
            self._open = (name, _pickled(path) if name.endswith(".bin") else _safe(path))
        return self._open[1]


def _safe(path: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own, which has no name to import
        raise _unreadable(path, error) from None


def _pickled(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises much for a file that is cut short, or names more than tensors
        raise _unreadable(path, error) from None
    if not isinstance(held, dict) or not all(isinstance(one, torch.Tensor) for one in held.values()):
        raise PolycomError(f"{path} holds more than tensors by name, so it is no {PICKLED}")
    return held


def _unreadable(path: Path, error: Exception) -> PolycomError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    how = " without running code from it" if path.suffix == ".bin" else ""
    return PolycomError(f"{path} cannot be read{how}: {reason}")
