"""Files that appear whole or not at all, hashes, and a folder that one process works in at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from polycom_ext.errors import PolycomError


@contextmanager
def atomic(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """Write to `temporary` (default: hidden, beside `path`); it becomes `path` when the block ends well."""
    temporary = temporary or path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sha256(path: Path, advance: Callable[[int], object]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; `advance` is told the bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it for this process; the lock ends with the process, however that ends.

    Raises:
        PolycomError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PolycomError(f"another process is working in {folder}; wait for it or end it") from None
        except OSError:
            pass  # a file system without locks
        yield
