"""What `polycom data prepare --format NAME` asks of a form of token files.

Each lies in the room of the trainer that reads it, and is found by the table in `trainers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy.typing as npt

from polycom_ext import trainers
from polycom_ext.errors import PolycomError

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


Mixture = Mapping[str, Sequence[tuple[str, float]]]
"""`train` and `valid` -> prefixes of data sets, each with its weight among them."""


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
    read: Callable[[str, int], npt.NDArray[Any]] | None = None
    """The tokens of a data set, by the prefix of its files, mapped into memory, for a model's vocabulary.

    Raises PolycomError for files that are damaged or of another vocabulary. None: it is only written here.
    """
    shared: int = 0
    """Tokens that a trainer's window shares with the next: 1 where L tokens are read and each has a target,
    L + 1 from the files; 0 where a window is L tokens, of which the first is no target."""
    mix: Callable[[Mixture], Mapping[str, str]] | None = None
    """Name -> text of the files from which a trainer reads a mixture; None: it takes all tokens as often."""


def find(name: str) -> TokenFormat:
    """The form that `--format NAME` asks for; raises PolycomError for a name that has none."""
    format_: TokenFormat = trainers.token_format(name)
    return format_


def found(path: Path) -> tuple[str, TokenFormat]:
    """The prefix and the form of a data set that exists, by its prefix or any of its files.

    Raises PolycomError where there is none, or where its form is only written here.
    """
    forms = {name: find(name) for name in trainers.format_names()}
    for form in filter(lambda form: form.read is not None, forms.values()):
        for suffix in ("", *form.files):
            prefix = str(path).removesuffix(suffix)
            if str(path).endswith(suffix) and all(Path(prefix + one).is_file() for one in form.files):
                return prefix, form
    listed = "; ".join(f"{form.summary}" for form in forms.values() if form.read is not None)
    raise PolycomError(f"{path} is no data set of tokens that can be read here ({listed})")


def write_tokens(tokens: Tokens, file: BinaryIO) -> None:
    """The tokens and nothing else."""
    for piece in tokens.pieces():
        file.write(piece.tobytes())
