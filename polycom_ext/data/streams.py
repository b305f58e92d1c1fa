"""Files as they are stored, plain or compressed, opened as streams of their content."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from polycom_ext.errors import PolycomError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class DamagedError(PolycomError):
    """A file that is not what its name says, or not whole."""


def cannot_read(path: Path, error: OSError) -> PolycomError:
    """What the system says of a file; its own error names none once the file is open."""
    return PolycomError(f"{path} cannot be read: {error.strerror or error}")


def kind_of(path: Path) -> tuple[str, str | None]:
    """The format's suffix and the compression, if any."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return path.with_suffix("").suffix.lower(), COMPRESSIONS[suffix]
    return suffix, None


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The decompressed stream, and the stored one below it whose `tell()` is the progress.

    Raises DamagedError where the compression is, PolycomError for what the system cannot read.
    """
    _, compression = kind_of(path)
    with path.open("rb", buffering=1 << 20) as stored:
        try:
            yield _decompressed(stored, compression), stored
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            if isinstance(error, OSError) and error.strerror:
                raise cannot_read(path, error) from None
            raise DamagedError(f"{path} is damaged or not {compression} ({error}); fetch it again") from None


def _decompressed(stored: BinaryIO, compression: str | None) -> BinaryIO:
    if compression is None:
        return stored
    if compression == "gzip":  # Python's reader takes several members, and zeros behind the last
        raw: object = gzip.GzipFile(fileobj=stored)
    else:
        raw = _ZstdFrames(stored)
    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, raw), 1 << 20))


class _ZstdFrames(io.RawIOBase):
    """The content of zstd frames, one after another, of any window that the format has.

    Arrow's reader refuses windows of more than 128 MiB (`zstd --long=28`), and zstandard's own takes a
    truncated file for a short one.
    """

    def __init__(self, stored: BinaryIO) -> None:
        self._stored = stored
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._output:
            # Little, because all that it expands to is held.
            block = self._input or self._stored.read(1 << 13)
            if not block:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            frame = self._frame or self._decompressor.decompressobj()
            self._output = memoryview(frame.decompress(block))
            self._input = frame.unused_data
            self._frame = None if frame.eof else frame
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size
