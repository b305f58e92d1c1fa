"""Token files as a trainer is about to read them: what is wrong with them is said before it starts.

Trainers read raw numbers: files of another type, of another vocabulary or with another end token train
without a word, or end in an IndexError hours later. `polycom data prepare` leaves in PREFIX.json what its
files hold, which is believed as long as their sizes are those that it names. Of others' files the sizes, the
headers and a sample of the tokens are looked at: `SAMPLE_BYTES` of all files of a run together, in pieces
spread evenly over each file; the whole of small ones. Files behind a URL are not looked at. Needs NumPy and
nothing heavier.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""`megatron.core.datasets.indexed_dataset.DType`, without its floating-point types"""
NUMPY_MAGIC = b"\x93NUMPY"
_HEADER = struct.Struct("<9sQBQQ")
"""magic, version, type, sequences S, document indices D; then S int32, S int64, D int64"""

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
class _File:
    """The tokens of one data set."""

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


def flat_problem(files: Mapping[str, str], dtype_name: str, model: Model) -> str:
    """What is wrong with OLMo's flat files, as a sentence for the user; empty if nothing is.

    Args:
        files: path of a file that exists -> NumPy's name of the type as which it will be read.
        dtype_name: what the user sets that type with.
        model: what will be trained on them.
    """
    found = []
    for name, dtype in files.items():
        if not isinstance(getattr(np, dtype, None), type) or not issubclass(getattr(np, dtype), np.integer):
            return f"{dtype_name} {dtype} is no integer type of NumPy's, such as uint16"
        suffix = Path(name).suffix
        file = _File(name.removesuffix(suffix), suffix, dtype, dtype_name)
        problem = _flat_problem(file)
        if problem:
            return problem
        found.append(file)
    return _problem(found, model)


def indexed_problem(prefixes: Iterable[str], model: Model) -> str:
    """What is wrong with Megatron's indexed data sets, as a sentence for the user; empty if nothing is.

    Args:
        prefixes: of `.bin` and `.idx` files that exist.
        model: what will be trained on them.
    """
    found = []
    for prefix in dict.fromkeys(prefixes):
        file, problem = _indexed(prefix)
        if problem:
            return problem
        found.append(file)
    return _problem(found, model)


def _problem(files: Sequence[_File], model: Model) -> str:
    """What the manifest of each file says or a sample shows, then all against each other."""
    manifests = {file: _manifest(file) for file in files}
    others = sum(manifest is None for manifest in manifests.values())
    budget = max(SAMPLE_BYTES // max(others, 1), PIECE_BYTES)
    for file, manifest in manifests.items():
        if manifest is None:
            problem = _sample_problem(file, budget, model)
        else:
            problem = _manifest_problem(file, manifest, model)
        if problem:
            return problem
    return _tokenizer_problem({file: found for file, found in manifests.items() if found is not None}, model)


def _flat_problem(file: _File) -> str:
    size = file.path.stat().st_size
    if size % np.dtype(file.dtype).itemsize:
        return f"{file.path} has {size} bytes, which are not whole tokens of {file.dtype}"
    with file.path.open("rb") as stored:
        if stored.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC:
            return f"{file.path} has a NumPy header, which would be read as tokens; write it with `tofile`"
    return ""


def _indexed(prefix: str) -> tuple[_File, str]:
    """The tokens that an index speaks of, and what it says against itself or its `.bin`."""
    file = _File(prefix, ".bin", "")
    index = file.beside(".idx")
    with index.open("rb") as stored:
        header = stored.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(MEGATRON_MAGIC):
            return file, f"{index} is no index of a Megatron data set"
        _, version, code, sequences, documents = _HEADER.unpack(header)
        dtype = MEGATRON_TYPES.get(code)
        if version != 1 or dtype is None:
            return file, f"{index} is of version {version} and token type {code}, which hold no tokens"
        if not sequences or not documents:
            return file, f"{index} holds no documents"
        size = _HEADER.size + 12 * sequences + 8 * documents
        if index.stat().st_size not in (size, size + sequences):  # the latter with a mode a sequence
            return file, f"{index} has {index.stat().st_size} bytes where its header asks for {size}"
        length = _number(stored, _HEADER.size + 4 * (sequences - 1), "<i")
        offset = _number(stored, _HEADER.size + 12 * sequences - 8, "<q")
    size, expected = file.path.stat().st_size, offset + length * np.dtype(dtype).itemsize
    if size != expected:
        return file, (
            f"{file.path} has {size} bytes where {index} asks for {expected}; "
            "one is damaged, or they do not belong together"
        )
    return _File(prefix, ".bin", dtype), ""


def _number(file: BinaryIO, offset: int, format_: str) -> int:
    file.seek(offset)
    number: int = struct.unpack(format_, file.read(struct.calcsize(format_)))[0]
    return number


def _manifest(file: _File) -> dict[str, Any] | None:
    """What `polycom data prepare` wrote beside the tokens, None for those that it did not make."""
    path = file.beside(".json")
    try:
        if path.stat().st_size > MANIFEST_BYTES:  # it may as well be the text of the corpus
            return None
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    names = ("files", "dtype", "vocab_size", "eos_id", "tokenizer_sha256")
    if not isinstance(manifest, dict) or any(name not in manifest for name in names):
        return None
    return manifest if file.suffix in manifest["files"] else None


def _manifest_problem(file: _File, manifest: dict[str, Any], model: Model) -> str:
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


def _sample_problem(file: _File, budget: int, model: Model) -> str:
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


def _tokenizer_problem(manifests: dict[_File, dict[str, Any]], model: Model) -> str:
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
    if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        return f"{first.path} was prepared with another tokenizer than {path}{_SAME}"
    return ""
