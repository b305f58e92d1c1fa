"""A folder of torch.distributed.checkpoint: what lies where in it, and its tensors, a part at a time.

Sharded checkpoints of several trainers are such folders: `.metadata` says for each tensor which piece of it
stands at which place of which file, and each piece is a file of torch.save of its own. torch's own reader
unpickles `.metadata` freely and reads whole tensors; this one runs nothing of it, and reads the layers of a
stack one by one. Only `Folder.read` needs torch.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polycom_ext.checkpoints import inert
from polycom_ext.errors import PolycomError

if TYPE_CHECKING:
    from torch import Tensor

METADATA = ".metadata"


@dataclass(frozen=True)
class Piece:
    """A rectangular part of a tensor, and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    """As torch names it: `float32`."""
    pieces: tuple[Piece, ...]


class Folder:
    """A checkpoint, open for reading. Raises PolycomError where it has no `.metadata`, or a damaged one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metadata = inert.load(path / METADATA)
        if not hasattr(self._metadata, "storage_data"):
            raise PolycomError(f"{path / METADATA} is none of torch.distributed.checkpoint")

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """By name; what else is saved beside them (random states, settings) is not among them."""
        places = {
            (index.fqn, _size(getattr(index, "offset", None))): place
            for index, place in self._metadata.storage_data.items()
        }
        tensors = {}
        for name, entry in self._metadata.state_dict_metadata.items():
            if not hasattr(entry, "chunks"):
                continue
            pieces = []
            for chunk in entry.chunks:
                offsets = _size(chunk.offsets)
                place = places[name, offsets]
                pieces.append(
                    Piece(offsets, _size(chunk.sizes), place.relative_path, place.offset, place.length)
                )
            tensors[name] = Stored(_size(entry.size), _dtype(entry.properties), tuple(pieces))
        return tensors

    def file_sizes(self) -> dict[str, int]:
        """Name of each file that `.metadata` speaks of -> the bytes that it must have at least."""
        needed: dict[str, int] = {}
        for place in self._metadata.storage_data.values():
            end = place.offset + place.length
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), end)
        return needed

    def read(self, name: str, index: tuple[int, ...] = ()) -> Tensor:
        """A tensor, or the part of it that an index of its first dimensions takes, on the CPU.

        Raises PolycomError for a name that is not there, and for a piece that cannot be read.
        """
        import torch

        stored = self.tensors.get(name)
        if stored is None:
            raise PolycomError(f"{self.path} holds no tensor {name}")
        leading = len(index)
        result = torch.empty(stored.shape[leading:], dtype=getattr(torch, stored.dtype))
        for piece in stored.pieces:
            ends = [offset + size for offset, size in zip(piece.offsets, piece.sizes, strict=True)]
            if all(o <= i < e for o, i, e in zip(piece.offsets, index, ends[:leading], strict=False)):
                within = tuple(i - o for i, o in zip(index, piece.offsets, strict=False))
                place = tuple(map(slice, piece.offsets[leading:], ends[leading:]))
                result[place] = self._piece(piece)[within]
        return result

    def _piece(self, piece: Piece) -> Tensor:
        import torch

        try:
            with (self.path / piece.file).open("rb") as file:
                file.seek(piece.start)
                data = io.BytesIO(file.read(piece.length))
            tensor: Tensor = torch.load(data, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises much for a file that is cut short or written over
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PolycomError(f"{self.path / piece.file} cannot be read: {reason}") from None
        if tuple(tensor.shape) != piece.sizes:
            raise PolycomError(
                f"{self.path / piece.file}: a piece of {piece.sizes} holds {tuple(tensor.shape)}"
            )
        return tensor


def _size(size: Any) -> tuple[int, ...]:
    """A torch.Size as it was pickled: called with a tuple; no offset at all for what is no tensor."""
    return () if size is None else tuple(size.arguments[0])


def _dtype(properties: Any) -> str:
    """Of TensorProperties, pickled as a tuple; a dtype is named like a class, `torch.float32`."""
    path: str = properties.state[0].path
    return path.removeprefix("torch.")
