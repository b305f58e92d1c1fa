"""A folder of torch.distributed.checkpoint: what lies where in it, and its tensors, a part at a time.

Sharded checkpoints of several trainers are such folders: `.metadata` says for each tensor which piece of it
stands at which place of which file, and each piece is a file of torch.save of its own. torch's own reader
unpickles `.metadata` freely and reads whole tensors; this one runs nothing of it, and reads the layers of a
stack one by one. torch's own writer wants all tensors, or their types, before it writes the first. Only
`Folder.read` and `Writer` need torch.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

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


class Writer:
    """Writes such a folder a piece at a time, into files that end once they hold `file_bytes`.

    The end of its `with` writes `.metadata`, which makes a checkpoint of the folder, unless the block failed.
    """

    def __init__(self, path: Path, file_bytes: int) -> None:
        self._path = path
        self._limit = file_bytes
        self._count = 0
        self._file: BinaryIO | None = None
        self._entries: dict[str, Any] = {}
        self._places: dict[Any, Any] = {}

    def write(self, name: str, tensor: Tensor, index: tuple[int, ...] = (), of: tuple[int, ...] = ()) -> None:
        """A tensor; or that which the index of the first dimensions takes of a stack of `of` such."""
        import torch
        from torch.distributed.checkpoint import metadata

        offsets = torch.Size([*index, *(0 for _ in tensor.shape)])
        chunk = metadata.ChunkStorageMetadata(offsets, torch.Size([*(1 for _ in index), *tensor.shape]))
        if name not in self._entries:
            properties = metadata.TensorProperties(dtype=tensor.dtype)
            size = torch.Size([*of, *tensor.shape])
            self._entries[name] = metadata.TensorStorageMetadata(properties, size, [])
        before = self._entries[name].properties.dtype
        if tensor.dtype != before:
            raise PolycomError(f"{name} would be of {before} in one part and of {tensor.dtype} in another")
        self._entries[name].chunks.append(chunk)
        whole = tensor.reshape(chunk.sizes)
        alone = whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()
        self._add(metadata.MetadataIndex(name, offsets), alone)

    def write_object(self, name: str, value: Any) -> None:
        """Anything that torch.save takes."""
        from torch.distributed.checkpoint import metadata

        self._entries[name] = metadata.BytesStorageMetadata()
        self._add(metadata.MetadataIndex(name), value)

    def _add(self, index: Any, value: Any) -> None:
        import torch
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        if self._file is None:
            self._file = (self._path / f"__{self._count}_0.distcp").open("wb")
            self._count += 1
        start = self._file.tell()
        torch.save(value, self._file)
        end = self._file.tell()
        self._places[index] = _StorageInfo(Path(self._file.name).name, start, end - start)
        if end >= self._limit:
            self._end_file()

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        from torch.distributed.checkpoint.metadata import Metadata

        self._end_file()
        if failed is None:
            told = Metadata(state_dict_metadata=self._entries, storage_data=self._places)
            (self._path / METADATA).write_bytes(pickle.dumps(told))


def _size(size: Any) -> tuple[int, ...]:
    """A torch.Size as it was pickled: called with a tuple; no offset at all for what is no tensor."""
    return () if size is None else tuple(size.arguments[0])


def _dtype(properties: Any) -> str:
    """Of TensorProperties, pickled as a tuple; a dtype is named like a class, `torch.float32`."""
    path: str = properties.state[0].path
    return path.removeprefix("torch.")
