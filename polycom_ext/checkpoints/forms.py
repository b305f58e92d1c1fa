"""What a form of checkpoints does for `polycom convert`; found by name in trainers.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from polycom_ext.checkpoints.model import Model


@dataclass(frozen=True)
class Ranks:
    """How many processes share a model, by the kind of parallelism."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1


@dataclass(frozen=True)
class Options:
    """What a user may wish of what is written."""

    dtype: str | None = None
    """Of the weights, as torch names it; None leaves them as they are."""
    shard_bytes: int = 5 * 10**9
    """What a file of weights may hold, but for a single tensor that is larger."""
    tokenizer: Path | None = None
    """A tokenizer.json to go with it."""
    ranks: Ranks = Ranks()
    """For which a form of a file a rank is written."""


@dataclass(frozen=True)
class Found:
    """A checkpoint to read."""

    path: Path
    passed_over: tuple[str, ...] = ()
    """Newer ones that are not whole, each with what is wrong with it."""


@runtime_checkable
class Reads(Protocol):
    """A form that can be read."""

    def find(self, path: Path) -> Found | None:
        """The newest whole one of this form in a folder, that of a run or itself; None if there is none.

        Raises PolycomError where there are such, and none is whole.
        """

    def read(self, path: Path) -> Model:
        """Open it. Raises PolycomError where it is damaged, or its model is not one that can be expressed."""


@runtime_checkable
class Writes(Protocol):
    """A form that can be written."""

    def write(self, model: Model, folder: Path, options: Options, advance: Callable[[int], object]) -> None:
        """Write a model into an empty folder; `advance` is told the bytes of each tensor."""


@runtime_checkable
class WritesByRank(Writes, Protocol):
    """A form whose files are those of ranks, so that `Options.ranks` makes a difference."""

    by_rank: bool
