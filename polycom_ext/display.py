"""Standard output and error that can fail without touching the work that is shown on them.

Under `tolerant()` what cannot be encoded is escaped, and a stream that takes no more (a closed pipe or
terminal, a full disk) is replaced by /dev/null, for this process and those that it starts: who prints never
sees an error.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)
"""Nobody reads any more; everything else is a loss that must be told."""


class Display(io.RawIOBase):
    """An open descriptor as a stream whose writes never fail."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.lost: OSError | None = None
        """Why output was lost that somebody may have wanted; None for one that nobody reads any more."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # a terminal that another program has left in this state
                select.select([], [self._descriptor], [])
            except OSError as error:
                if error.errno not in _GONE:
                    self.lost = error
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._descriptor)
                os.close(null)
                return len(data)


def printable(text: str) -> str:
    """A text of others as one line of a terminal: what would move the cursor, or is no character, escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


@contextmanager
def tolerant() -> Iterator[Display | None]:
    """Make sys.stdout and sys.stderr tolerant; yields what lies under stdout, None if it is no descriptor."""
    _occupy_standard_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, out = _tolerant(sys.stdout, 1)
    sys.stderr, _ = _tolerant(sys.stderr, 2)
    try:
        yield out
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if out is not None and out.lost is not None:
            print(f"polycom: standard output: {out.lost.strerror}; a part of it is lost", file=sys.stderr)
        sys.stdout, sys.stderr = before


def _tolerant(stream: TextIO | None, descriptor: int) -> tuple[TextIO, Display | None]:
    encoding, line_buffering = "utf-8", descriptor == 2
    if stream is not None:
        try:
            descriptor = stream.fileno()
        except (OSError, ValueError):  # a test's or a notebook's: nothing under it can fail
            return stream, None
        stream.flush()
        encoding = stream.encoding or encoding
        line_buffering = line_buffering or getattr(stream, "line_buffering", False)
    display = Display(descriptor)
    text = io.TextIOWrapper(
        io.BufferedWriter(display), encoding, errors="backslashreplace", line_buffering=line_buffering
    )
    return text, display


def _occupy_standard_descriptors() -> None:
    """Open what the caller has closed (`>&-`): else the next file gets its number, and what is printed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
