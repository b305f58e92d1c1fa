"""Pickles, read without running anything that they name.

A pickle calls whatever its author likes. Here each thing that it names becomes a `Named`, which only
remembers how it was made; containers, numbers and texts are what they are.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from polycom_ext.errors import PolycomError


class Named(dict[Any, Any]):
    """An instance of a class that was not imported, or what a function would have given.

    Its state is in its attributes, or in `state` where that is a tuple; its items are in itself and in
    `listed`; what it was called with is in `arguments`.
    """

    path = ""
    """MODULE.NAME of the class or function."""

    def __new__(cls, *arguments: Any, **_: Any) -> Named:
        made = super().__new__(cls)
        made.arguments = arguments
        made.listed = []
        made.state = ()
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    arguments: tuple[Any, ...]
    listed: list[Any]
    state: tuple[Any, ...]

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        elif isinstance(state, tuple):
            self.state = state

    def append(self, item: Any) -> None:
        self.listed.append(item)

    def extend(self, items: Any) -> None:
        self.listed.extend(items)

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"{self.path}{self.arguments}"


def _member(of: Any, name: str) -> type[Named]:
    return type(name, (Named,), {"path": f"{getattr(of, 'path', of)}.{name}"})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("builtins", "getattr"), ("__builtin__", "getattr")):
            return _member  # by which pickle names a class in a class
        return type(name, (Named,), {"path": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return pid


def loads(data: bytes) -> Any:
    """What a pickle says. Raises PolycomError for bytes that are none."""
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # an unpickler raises whatever its operations stumble over
        raise PolycomError(f"it is no pickle, or a damaged one ({error})") from None


def load(path: Path) -> Any:
    """What a file of pickle, or of torch.save, says; of its tensors nothing but where they would lie.

    Raises PolycomError for a file that is missing, truncated or neither.
    """
    try:
        if not zipfile.is_zipfile(path):
            return loads(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            (inside,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            return loads(archive.read(inside))
    except FileNotFoundError:
        raise PolycomError(f"{path} is missing") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise PolycomError(f"{path} cannot be read: {error}") from None
    except PolycomError as error:
        raise PolycomError(f"{path} cannot be read: {error}") from None
