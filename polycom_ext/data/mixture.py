"""The data sets of a corpus together: how many tokens each source has, and how much of it is trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polycom_ext.data import formats, manifest
from polycom_ext.data.listing import Listing
from polycom_ext.data.recipe import Recipe
from polycom_ext.errors import PolycomError
from polycom_ext.files import atomic, sha256, write_text

PIECE = 1 << 22
"""Tokens that are read at a time."""


@dataclass(frozen=True)
class Count:
    """What a source has become."""

    source: str
    files: int
    published_files: int
    documents: int
    tokens: int
    published: float
    """Tokens, of all its files."""
    skipped: int
    """Documents that are none."""

    @property
    def whole(self) -> bool:
        """Whether all files are taken, so that the tokens may be compared."""
        return self.files == self.published_files

    @property
    def difference(self) -> float:
        """From the tokens published, as a part of them."""
        return self.tokens / self.published - 1


def made(prefix: Path, tokenizer_sha256: str) -> manifest.Manifest | None:
    """The manifest of a data set that is whole and made with that tokenizer."""
    said = manifest.read(_beside(prefix, ".json"))
    if said is None or said["tokenizer_sha256"] != tokenizer_sha256:
        return None
    for suffix, size in said["files"].items():
        path = _beside(prefix, suffix)
        if not path.is_file() or path.stat().st_size != size:
            return None
    return said


def is_there(prefix: Path, format_: str) -> bool:
    """Whether the files of a data set are there, which appear whole or not at all."""
    return all(_beside(prefix, suffix).is_file() for suffix in formats.find(format_).files)


def counts(recipe: Recipe, found: Listing, folder: Path) -> list[Count]:
    """What each source has become, in the recipe's order.

    Raises:
        PolycomError: a data set is not there, or damaged.
    """
    digest, sums = sha256(folder / "tokenizer.json"), {}
    for label in recipe.train:
        parts = [part for part in found.parts if part.source == label]
        said = [made(folder / part.name, digest) for part in parts]
        whole = [one for one in said if one is not None]
        if len(whole) < len(parts):
            raise PolycomError(
                f"{len(parts) - len(whole)} of {len(parts)} files of {label} in {folder} are not made yet, "
                f"or "
                f"damaged; `polycom data fetch {recipe.name}` goes on"
            )
        sums[label] = Count(
            label,
            len(parts),
            found.published[label],
            documents=sum(one["documents"] for one in whole),
            tokens=sum(one["tokens"] for one in whole),
            published=recipe.train[label].tokens,
            skipped=sum(one["skipped"] for one in whole),
        )
    return list(sums.values())


def verify(recipe: Recipe, sums: list[Count]) -> None:
    """Raise PolycomError for a source with other numbers of files or tokens than are published."""
    for count in sums:
        files = recipe.train[count.source].files
        if files is not None and count.published_files != files:
            raise PolycomError(f"{count.source} has {count.published_files} files, but {files} are published")
        if count.whole and abs(count.difference) > recipe.within:
            raise PolycomError(
                f"{count.source} has {count.tokens} tokens, {count.difference:+.1%} from the "
                f"{count.published:.0f} "
                f"published, where {recipe.within:.0%} are allowed; is it the tokenizer, or are files not "
                f"whole?"
            )


def write(recipe: Recipe, found: Listing, folder: Path, format_: str) -> None:
    """Write what a trainer reads the mixture from, where its form has such a file."""
    mix = formats.find(format_).mix
    if mix is None:
        return
    tokens = {
        part: int((manifest.read(_beside(folder / part.name, ".json")) or {})["tokens"])
        for part in found.parts
    }
    of_source: Counter[tuple[str, str]] = Counter()
    for part, count in tokens.items():
        of_source[part.source, part.split] += count
    splits: dict[str, list[tuple[str, float]]] = {"train": [], "valid": []}
    for part, count in tokens.items():
        source = recipe.train[part.source]
        weight = source.tokens if source.weight is None else source.weight
        splits[part.split].append(
            (str(folder / part.name), weight * count / of_source[part.source, part.split])
        )
    suffix, *_ = formats.find(format_).files
    for label in recipe.validation.sets:
        prefix = folder / "validation" / label
        splits["valid"].append((str(prefix), float(_beside(prefix, suffix).stat().st_size)))
    for split, parts in splits.items():
        total = sum(weight for _, weight in parts)
        splits[split] = [(prefix, weight / total) for prefix, weight in parts]
    for name, text in mix(splits).items():
        write_text(folder / name, text)


def write_flat(raw: Path, prefix: Path, format_: str, dtype: str, eos_id: int) -> None:
    """Write a flat file of tokens in another form; a document ends where `eos_id` stands.

    Raises:
        PolycomError: the file is not one of whole tokens.
    """
    size = np.dtype(dtype).itemsize
    if not raw.stat().st_size or raw.stat().st_size % size:
        raise PolycomError(
            f"{raw} has {raw.stat().st_size} bytes, which are not tokens of {dtype}; fetch it again"
        )
    tokens = np.memmap(raw, np.dtype(dtype).newbyteorder("<"), mode="r")
    ends = np.concatenate([np.flatnonzero(tokens[:-1] == eos_id) + 1, [len(tokens)]])
    lengths = np.diff(ends, prepend=0).astype("<i4")
    stored = formats.Tokens(
        tokens.dtype.str, len(lengths), partial(_pieces, tokens), partial(_pieces, lengths)
    )
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for suffix, writer in formats.find(format_).files.items():
        with atomic(_beside(prefix, suffix)) as file:
            writer(stored, file)


def _pieces(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    return (array[first : first + PIECE] for first in range(0, len(array), PIECE))


def _beside(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)
