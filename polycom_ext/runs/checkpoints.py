"""Whether a checkpoint is whole, told before a start and without torch: by its files' sizes and frames.

A killed job, a full disk or a lost cache leaves files that are missing, cut off, or zeros from some place on.
What else may have become of the bytes within is not looked for: that would be to read all of them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from polycom_ext.checkpoints.sharded import METADATA, Folder
from polycom_ext.errors import PolycomError

ASIDE = "damaged"
"""The folder beside the checkpoints where damaged ones are moved, so that a trainer that reaches their step
again writes into a folder of its own: the two, mixed, could pass for a whole one."""
_END_RECORD = 22
"""Bytes of the record that ends a file of torch.save."""


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that is not whole."""

    path: Path
    problem: str
    """The end of a sentence about it."""

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"

    def set_aside(self) -> Path:
        """Move it away, under a name that is free; nothing is deleted."""
        folder = self.path.with_name(ASIDE)
        folder.mkdir(exist_ok=True)
        names = (f"{self.path.name}{suffix}" for suffix in ("", *(f".{n}" for n in range(2, 1000))))
        free = next(folder / name for name in names if not (folder / name).exists())
        return self.path.rename(free)


@dataclass(frozen=True)
class Choice:
    """The checkpoint to go on from, and what is passed over for it."""

    step: int | None = None
    path: Path | None = None
    damaged: list[Damaged] = field(default_factory=list)
    """Newer ones, the newest first."""


def choose(found: Iterable[tuple[int, Path, str | None]]) -> Choice:
    """The first whole one of (step, path, what is wrong with it), looked at no further than that."""
    damaged: list[Damaged] = []
    for step, path, problem in found:
        if problem is None:
            return Choice(step, path, damaged)
        damaged.append(Damaged(path, problem))
    return Choice(damaged=damaged)


def problem_of_file(folder: Path, name: str) -> str | None:
    """What is wrong with a file of torch.save or of safetensors, or with JSON; None if nothing is."""
    path = folder / name
    try:
        size = path.stat().st_size
        if not size:
            return f"holds {name} of 0 bytes"
        if path.suffix == ".safetensors":
            return _problem_of_safetensors(path, name, size)
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".pt":
            with zipfile.ZipFile(path) as archive:
                if not any(entry.endswith("data.pkl") for entry in archive.namelist()):
                    return f"holds {name}, which is no file of torch.save"
    except FileNotFoundError:
        return f"lacks {name}"
    except zipfile.BadZipFile:
        return f"holds {name} without its end"
    except ValueError:
        return f"holds {name}, which cannot be read"
    except OSError as error:
        return f"holds {name}, which cannot be read ({error.strerror or error})"
    return None


def problem_of_distributed(folder: Path) -> str | None:
    """What is wrong with a folder of torch.distributed.checkpoint; .metadata says what each file holds."""
    metadata = folder / METADATA
    try:
        about = metadata.stat()
        ends = _ends(metadata, about.st_mtime_ns, about.st_size)
    except FileNotFoundError:
        return "lacks .metadata, which is written last"
    except (PolycomError, AttributeError, TypeError):  # cut off or written over
        return "holds .metadata, which cannot be read"
    for name, end in sorted(ends.items()):
        problem = _problem_of_part(folder / name, end)
        if problem is not None:
            return problem
    return None


@lru_cache(maxsize=64)
def _ends(metadata: Path, mtime_ns: int, size: int) -> dict[str, int]:
    """File -> how far it reaches at least; `status --watch` would ask every few seconds."""
    return Folder(metadata.parent).file_sizes()


def _problem_of_part(path: Path, end: int) -> str | None:
    try:
        size = path.stat().st_size
        if size < end:
            return f"holds {path.name} of {size} bytes, not {end}"
        with path.open("rb") as file:
            head = file.read(4)
            file.seek(max(0, end - _END_RECORD))
            tail = file.read(_END_RECORD)
    except FileNotFoundError:
        return f"lacks {path.name}"
    except OSError as error:
        return f"holds {path.name}, which cannot be read ({error.strerror or error})"
    if end and not (any(head) and any(tail)):
        return f"holds {path.name}, in which zeros stand for what was written"
    return None


def _problem_of_safetensors(path: Path, name: str, size: int) -> str | None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            return f"holds {name} without its end"
        header: dict[str, Any] = json.loads(file.read(length))
    ends = [about["data_offsets"][1] for key, about in header.items() if key != "__metadata__"]
    needed = 8 + length + max(ends, default=0)
    return f"holds {name} of {size} bytes, not {needed}" if size < needed else None
