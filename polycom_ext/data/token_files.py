"""Token files as a trainer is about to read them: what is wrong with them is said before it starts.

Trainers read raw numbers: files of another type, of another vocabulary or with another end token train
without a word, or end in an IndexError hours later. `polycom data prepare` leaves in PREFIX.json what its
files hold, which is believed as long as their sizes are those that it names. Of others' files the sizes, the
headers and a sample of the tokens are looked at: `SAMPLE_BYTES` of all files of a run together, in pieces
spread evenly over each file; the whole of small ones. Files behind a URL are not looked at. Needs NumPy and
nothing heavier.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polycom_ext.files import sha256

SAMPLE_BYTES, PIECE_BYTES = 256 << 20, 64 << 10
MANIFEST_BYTES = 256 << 20
_SAME = "; prepare one anew, or remove its PREFIX.json if the tokenizers differ in how they are written only"


@dataclass(frozen=True)
class Model:
    """What a trainer is told of tokens; None where that cannot be known before it starts."""

    vocab_size: int | None
    """Ids are below it; an embedding's padding is not counted."""
    vocab_name: str
    """What it is called where the user sets it."""
    eos_id: int | None = None
    """The id that ends documents, if anything there asks for it."""
    eos_name: str = ""
    tokenizer: Path | None = None
    """A tokenizer.json, or its folder, that the trainer loads beside the files."""


@dataclass(frozen=True)
class TokenFile:
    """The tokens of one data set, in a file that exists."""

    prefix: str
    suffix: str
    dtype: str
    """NumPy's name of the type as which they will be read."""
    dtype_name: str = ""
    """What the user sets it with, if it is not told by the files."""

    @property
    def path(self) -> Path:
        return self.beside(self.suffix)

    def beside(self, suffix: str) -> Path:
        return Path(self.prefix + suffix)


def problem(files: Sequence[TokenFile], model: Model) -> str:
    """What is wrong with the files for the model, as a sentence for the user; empty if nothing is.

    Of each, what its manifest says or a sample shows; then all against each other.
    """
    manifests = {file: _manifest(file) for file in files}
    others = sum(manifest is None for manifest in manifests.values())
    budget = max(SAMPLE_BYTES // max(others, 1), PIECE_BYTES)
    for file, manifest in manifests.items():
        if manifest is None:
            sentence = _sample_problem(file, budget, model)
        else:
            sentence = _manifest_problem(file, manifest, model)
        if sentence:
            return sentence
    return _tokenizer_problem({file: found for file, found in manifests.items() if found is not None}, model)


def tokenizer(data: str) -> tuple[Path | None, int] | None:
    """The tokenizer.json that made a data set, and the id that ends documents.

    No path where there is no such file any more; None where `polycom data prepare` did not make it.

    Args:
        data: its prefix, or one of its files.
    """
    prefix, suffix = Path(data), Path(data).suffix
    for beside, of in ((Path(f"{prefix}.json"), None), (prefix.with_suffix(".json"), suffix)):
        manifest = _read(beside)
        if manifest is not None and (of is None or of in manifest["files"]):
            named = Path(str(manifest["tokenizer"]))
            for path in (named, beside.with_name(named.name)):
                if path.is_file() and sha256(path) == manifest["tokenizer_sha256"]:
                    return path, manifest["eos_id"]
            return None, manifest["eos_id"]
    return None


def _manifest(file: TokenFile) -> dict[str, Any] | None:
    """What `polycom data prepare` wrote beside the tokens, None for those that it did not make."""
    manifest = _read(file.beside(".json"))
    return manifest if manifest is not None and file.suffix in manifest["files"] else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > MANIFEST_BYTES:  # it may as well be the text of the corpus
            return None
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    names = ("files", "dtype", "vocab_size", "eos_id", "tokenizer", "tokenizer_sha256")
    if not isinstance(manifest, dict) or any(name not in manifest for name in names):
        return None
    return manifest


def _manifest_problem(file: TokenFile, manifest: dict[str, Any], model: Model) -> str:
    path, size, expected = file.path, file.path.stat().st_size, manifest["files"][file.suffix]
    if size != expected:
        return (
            f"{path} has {size} bytes, not the {expected} that {file.beside('.json')} names; prepare it again"
        )
    if file.dtype != manifest["dtype"]:
        return f"{path} holds tokens of {manifest['dtype']}, which would be read as {file.dtype}" + (
            f"; set {file.dtype_name}: {manifest['dtype']}" if file.dtype_name else "; prepare it again"
        )
    if model.vocab_size is not None and manifest["vocab_size"] > model.vocab_size:
        return (
            f"{path} has a vocabulary of {manifest['vocab_size']}, more than {model.vocab_name} "
            f"{model.vocab_size}"
        )
    if model.eos_id is not None and manifest["eos_id"] != model.eos_id:
        return f"{path} ends documents with {manifest['eos_id']}, not with {model.eos_name} {model.eos_id}"
    return ""


def _sample_problem(file: TokenFile, budget: int, model: Model) -> str:
    path, greatest, smallest, even, odd = file.path, 0, 0, 0, 0
    for tokens in _pieces(path, np.dtype(file.dtype).newbyteorder("<"), budget):
        greatest, smallest = max(greatest, int(tokens.max())), min(smallest, int(tokens.min()))
        even, odd = max(even, int(tokens[::2].max())), max(odd, int(tokens[1::2].max(initial=0)))
    if file.dtype == "uint16" and odd <= 3 < even and path.stat().st_size >= 256:
        return f"{path} looks like tokens of 32 bits, which would be read as uint16" + (
            f"; set {file.dtype_name}: uint32" if file.dtype_name else ""
        )
    if smallest < 0:
        return f"{path} holds the token {smallest}; it is damaged, or of another type than {file.dtype}"
    if model.vocab_size is not None and greatest >= model.vocab_size:
        return (
            f"{path} holds the token {greatest}, which is not below {model.vocab_name} {model.vocab_size}; "
            f"it is of another vocabulary, or of another type than {file.dtype}"
        )
    return ""


def _pieces(path: Path, dtype: np.dtype[Any], budget: int) -> Iterator[npt.NDArray[Any]]:
    """The tokens of a file, if they are no more than `budget` bytes, else pieces spread evenly over it."""
    size = path.stat().st_size
    pieces = -(-size // PIECE_BYTES)
    read = min(pieces, budget // PIECE_BYTES)
    step = PIECE_BYTES if read == pieces else (size - PIECE_BYTES) // max(read - 1, 1)
    with path.open("rb") as stored:
        for index in range(read):
            stored.seek(index * step & -8)  # where a token begins, of any type
            yield np.frombuffer(stored.read(PIECE_BYTES), dtype)


def _tokenizer_problem(manifests: dict[TokenFile, dict[str, Any]], model: Model) -> str:
    """Whether files, or the files and the trainer, have different tokenizers."""
    if not manifests:
        return ""
    first, *others = manifests
    expected = manifests[first]["tokenizer_sha256"]
    for file in others:
        if manifests[file]["tokenizer_sha256"] != expected:
            return f"{first.path} and {file.path} were prepared with different tokenizers{_SAME}"
    path = model.tokenizer
    if path is not None and path.is_dir():
        path = path / "tokenizer.json"
    if path is None or path.suffix != ".json" or not path.is_file():
        return ""
    if sha256(path) != expected:
        return f"{first.path} was prepared with another tokenizer than {path}{_SAME}"
    return ""
