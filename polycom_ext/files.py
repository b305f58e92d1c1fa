"""Files that appear whole or not at all, hashes, and locks that end with the processes that hold them.

They are flock's, without filelock (3.32): most are handed down to child processes, for which it has no way,
and it fails where a file system answers flock with ENOTSUP, EINVAL or ENOLCK, as some Lustre and NFS mounts
do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from polycom_ext.errors import PolycomError

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What flock says on a file system without locks: some Lustre and NFS mounts."""
_told: set[int] = set()


@contextmanager
def atomic(path: Path, temporary: Path | None = None, executable: bool = False) -> Iterator[BinaryIO]:
    """Write to `temporary`, which becomes `path` when the block ends well.

    By default it is hidden, beside `path`, and this process's own. Its permissions are what the umask leaves
    of 0666, or of 0777 if it is executable.
    """
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if executable:
            readable = temporary.stat().st_mode & 0o444
            temporary.chmod(temporary.stat().st_mode | readable >> 2)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise


def write_text(path: Path, text: str, executable: bool = False) -> None:
    """Write a text in UTF-8, atomically; what no encoding can hold of a file's name goes out as its bytes."""
    with atomic(path, executable=executable) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def is_full(folder: Path) -> bool:
    """Whether there is no room for a megabyte on the disk of a folder, or in its user's quota."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False


def sha256(path: Path, advance: Callable[[int], object] = lambda count: None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; `advance` is told the bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def lock(file: IO[bytes], wait: bool = False) -> bool:
    """Lock an open file for this process and all that inherit it; the lock ends with the last of them.

    Returns False if others hold it, unless told to `wait` for them. On a file system without locks, which is
    told once, everybody gets it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        device = os.fstat(file.fileno()).st_dev
        if device not in _told:
            _told.add(device)
            print(
                f"note: the file system of {file.name} has no locks, so nothing keeps two processes from "
                "working on the same files there",
                file=sys.stderr,
            )
    return True


def holders(path: Path) -> list[int]:
    """Ids, ascending, of the processes that hold a file's lock; of other users' processes only root knows."""
    return _having_open(path, lambda about: b"FLOCK" in about)


def writers(path: Path) -> list[int]:
    """As `holders`, of those that have it open for writing: all that hold its lock, where there are locks."""
    return _having_open(path, lambda about: int(about.split()[3], 8) & os.O_ACCMODE != os.O_RDONLY)


def _having_open(path: Path, wants: Callable[[bytes], bool]) -> list[int]:
    """The processes that have a file open in such a way, judged by what /proc says about the descriptor."""
    wanted = path.stat()
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            status = link.stat()
            if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
                about = link.parents[1] / "fdinfo" / link.name
                if wants(about.read_bytes()):
                    found.add(int(link.parts[2]))
    return sorted(found)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it for this process; the lock ends with the process, however that ends.

    Raises:
        PolycomError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("wb") as file:
        if not lock(file):
            raise PolycomError(f"another process is working in {folder}; wait for it or end it")
        yield
