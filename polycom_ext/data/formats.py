"""What `polycom data prepare --format NAME` asks of a form of token files.

Each lies in the room of the trainer that reads it, and is found by the table in `trainers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy.typing as npt

from polycom_ext import trainers

Pieces = Callable[[], Iterator[npt.NDArray[Any]]]
"""Arrays of some megabytes, one after another, from the first at each call."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of all documents, in order."""

    dtype: str
    """NumPy's name of the type of a token."""
    documents: int
    pieces: Pieces
    """The tokens."""
    lengths: Pieces
    """How many tokens each document has, the one that ends it among them: int32."""


@dataclass(frozen=True)
class TokenFormat:
    """A form of token files."""

    summary: str
    """What `--help` says of it."""
    files: Mapping[str, Callable[[Tokens, BinaryIO], object]]
    """Suffix of each of its files -> what writes that file."""
    dtype: Callable[[int], str]
    """NumPy's name, with the byte order, of the type of a token, for a size of the vocabulary.

    Raises PolycomError for a vocabulary that does not fit.
    """


def find(name: str) -> TokenFormat:
    """The form that `--format NAME` asks for; raises PolycomError for a name that has none."""
    format_: TokenFormat = trainers.token_format(name)
    return format_


def write_tokens(tokens: Tokens, file: BinaryIO) -> None:
    """The tokens and nothing else."""
    for piece in tokens.pieces():
        file.write(piece.tobytes())
