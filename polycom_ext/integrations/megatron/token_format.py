"""Megatron's indexed data sets: written, and looked at before a run reads them.

`PREFIX.bin` holds the tokens of all documents one after another, `PREFIX.idx` what
`megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder` (0.17.1) writes for one sequence a document:

    b"MMIDIDX\\0\\0", version 1 (uint64), token type (uint8: 4 = int32, 8 = uint16),
    sequences S (uint64), document indices D = S + 1 (uint64),
    length of each sequence (S x int32), its byte offset (S x int64), document indices 0, 1, ... S (D x int64)

All numbers are little-endian.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from polycom_ext.data import token_files
from polycom_ext.data.formats import Mixture, TokenFormat, Tokens, write_tokens
from polycom_ext.data.token_files import Model, TokenFile
from polycom_ext.errors import PolycomError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""`megatron.core.datasets.indexed_dataset.DType`, without its floating-point types"""
_CODES = {np.dtype(name).newbyteorder("<").str: code for code, name in TYPES.items()}


def token_dtype(vocab_size: int) -> str:
    """uint16 below a vocabulary of 65500 and int32 from there, as upstream's `DType.optimal_dtype`.

    Raises:
        PolycomError: the vocabulary does not fit into int32.
    """
    if vocab_size > 1 << 31:
        raise PolycomError(
            f"a vocabulary of {vocab_size} does not fit into the 32-bit tokens of --format megatron; "
            "take a tokenizer of smaller ids"
        )
    return "<u2" if vocab_size < 65500 else "<i4"


def write_index(tokens: Tokens, file: BinaryIO) -> None:
    """The `.idx` beside a `.bin` of these tokens."""
    documents = tokens.documents
    file.write(HEADER.pack(MAGIC, 1, _CODES[tokens.dtype], documents, documents + 1))
    for lengths in tokens.lengths():
        file.write(lengths.astype("<i4").tobytes())
    offset = 0
    for lengths in tokens.lengths():
        sizes = lengths.astype(np.int64) * np.dtype(tokens.dtype).itemsize
        ends = offset + np.cumsum(sizes)
        file.write((ends - sizes).astype("<i8").tobytes())
        offset = int(ends[-1]) if len(ends) else offset
    block = 1 << 20
    for first in range(0, documents + 1, block):
        file.write(np.arange(first, min(first + block, documents + 1), dtype="<i8").tobytes())


def read(prefix: str, vocab_size: int) -> npt.NDArray[Any]:
    """The tokens of `PREFIX.bin`, mapped. Raises PolycomError as `problem` says."""
    said = problem([prefix], Model(vocab_size, "the model's vocab_size"))
    indexed = _indexed(prefix)
    if said or isinstance(indexed, str):
        raise PolycomError(said)
    dtype = np.dtype(indexed.dtype).newbyteorder("<")
    return np.memmap(indexed.path, dtype, mode="r") if indexed.path.stat().st_size else np.empty(0, dtype)


def blend(mixture: Mixture) -> dict[str, str]:
    """The file for `--per-split-data-args-path`."""
    splits = {
        split: [word for prefix, weight in parts for word in (f"{weight:.9g}", prefix)] or None
        for split, parts in mixture.items()
    }
    return {"blend.json": json.dumps({**splits, "test": None}, indent=1) + "\n"}


INDEXED = TokenFormat(
    summary="indexed dataset, PREFIX.bin and .idx",
    files={".bin": write_tokens, ".idx": write_index},
    dtype=token_dtype,
    read=read,
    shared=1,
    mix=blend,
)


def problem(prefixes: Iterable[str], model: Model) -> str:
    """What is wrong with data sets for a model, as a sentence for the user; empty if nothing is.

    Args:
        prefixes: of `.bin` and `.idx` files that exist.
        model: what will be trained on them.
    """
    files = []
    for prefix in dict.fromkeys(prefixes):
        found = _indexed(prefix)
        if isinstance(found, str):
            return found
        files.append(found)
    return token_files.problem(files, model)


def _indexed(prefix: str) -> TokenFile | str:
    """The tokens that an index speaks of, or what it says against itself or its `.bin`."""
    path, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    with index.open("rb") as stored:
        header = stored.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            return f"{index} is no index of a Megatron data set"
        _, version, code, sequences, documents = HEADER.unpack(header)
        dtype = TYPES.get(code)
        if version != 1 or dtype is None:
            return f"{index} is of version {version} and token type {code}, which hold no tokens"
        if not sequences or not documents:
            return f"{index} holds no documents"
        size = HEADER.size + 12 * sequences + 8 * documents
        if index.stat().st_size not in (size, size + sequences):  # the latter with a mode a sequence
            return f"{index} has {index.stat().st_size} bytes where its header asks for {size}"
        length = _number(stored, HEADER.size + 4 * (sequences - 1), "<i")
        offset = _number(stored, HEADER.size + 12 * sequences - 8, "<q")
    size, expected = path.stat().st_size, offset + length * np.dtype(dtype).itemsize
    if size != expected:
        return (
            f"{path} has {size} bytes where {index} asks for {expected}; "
            "one is damaged, or they do not belong together"
        )
    return TokenFile(prefix, ".bin", dtype)


def _number(file: BinaryIO, offset: int, format_: str) -> int:
    file.seek(offset)
    number: int = struct.unpack(format_, file.read(struct.calcsize(format_)))[0]
    return number
