"""A file of torch.save, read without running what its pickle names, and written, a tensor at a time."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polycom_ext.checkpoints import inert
from polycom_ext.errors import PolycomError

if TYPE_CHECKING:
    from torch import Tensor

_REBUILT = "torch._utils._rebuild_tensor_v2"
"""Called with (storage, offset, size, stride, …); a storage is ("storage", type, key, device, numel)."""
_AS_TYPE = "torch._tensor._rebuild_from_type_v2"
"""Called with (function, type, its arguments, state) where a tensor has attributes."""
_PARAMETER = "torch._utils._rebuild_parameter"
"""Called with (tensor, requires_grad, hooks)."""
_DTYPES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16"},
    **{"BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16"},
    **{"CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool"},
}
"""torch's name of a storage's type -> of its dtype."""


class Archive:
    """Open for reading. Raises PolycomError for a file that is missing, damaged, or none of torch.save."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = inert.load(path)

    def tensor(self, said: Any) -> Tensor:
        """The tensor that a part of `content` stands for, read from the file, on the CPU.

        Raises PolycomError for what is no plain tensor, and for bytes that cannot be read.
        """
        import torch

        (_, kind, key, *_), offset, size, stride = _rebuilt(said, self.path)[:4]
        size, stride = (tuple(getattr(numbers, "arguments", (numbers,))[0]) for numbers in (size, stride))
        name = _DTYPES.get(kind.path.removeprefix("torch."))
        if name is None:
            raise PolycomError(f"{self.path} holds a tensor of {kind.path}, which cannot be read here")
        dtype = getattr(torch, name)
        extent = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else 0
        data = self._bytes(f"data/{key}", offset * dtype.itemsize, extent * dtype.itemsize)
        flat = torch.frombuffer(data, dtype=dtype) if extent else torch.empty(0, dtype=dtype)
        return flat.as_strided(size, stride)

    def _bytes(self, record: str, start: int, length: int) -> bytearray:
        """Of a record of the archive; the whole of one is compared with its checksum."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                root = archive.namelist()[0].partition("/")[0]
                with archive.open(f"{root}/{record}") as file:
                    if start:
                        file.seek(start)
                    data = bytearray(file.read(length))
        except (OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise PolycomError(f"{self.path} cannot be read: {error}") from None
        if len(data) != length:
            raise PolycomError(f"{self.path} cannot be read: {record} ends after {len(data)} bytes")
        return data


class Waiting:
    """Tensors that wait in a folder for the file of torch.save that will hold them, none in memory.

    The folder is there, with what waits in it, until the end of the `with`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def add(self, tensor: Tensor) -> Tensor:
        """The same numbers, on the disk."""
        import torch

        file = str(self._folder / f"{self._count}")
        self._count += 1
        mapped = torch.from_file(file, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return mapped.view(tensor.shape).copy_(tensor)

    def __enter__(self) -> Waiting:
        self._folder.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder)


def _rebuilt(said: Any, path: Path) -> tuple[Any, ...]:
    """The arguments of the call that would make it."""
    called = getattr(said, "path", None)
    if called == _PARAMETER:
        return _rebuilt(said.arguments[0], path)
    if called == _AS_TYPE and getattr(said.arguments[0], "path", None) == _REBUILT:
        arguments: tuple[Any, ...] = said.arguments[2]
        return arguments
    if called == _REBUILT:
        arguments = said.arguments
        return arguments
    raise PolycomError(f"{path} holds {called or type(said).__name__} where a tensor is expected")
