"""The one exception that the command line turns into a sentence and exit status 2, and its "did you mean"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class PolycomError(Exception):
    """A mistake of the user's that the message names, together with the way out."""


class MissingDependencyError(PolycomError, ImportError):
    """An optional package that an adapter needs is not installed."""


@contextmanager
def needing(what: str, extra: str) -> Iterator[None]:
    """Around imports: a package that is not installed is named, with our extra that has it.

    A part that is missing of a package that is there is no such case.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or "." in error.name:
            raise
        said = f"{what} {error.name}: pip install 'polycom-ext[{extra}]'"
        raise MissingDependencyError(said) from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known word, or nothing if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
