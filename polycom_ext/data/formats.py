"""The two token file formats, written from shards as streams.

Megatron: `PREFIX.bin`, the tokens of all documents one after another, and `PREFIX.idx`, what
`megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder` (0.17.1) writes for one sequence a document:

    b"MMIDIDX\\0\\0", version 1 (uint64), token type (uint8: 4 = int32, 8 = uint16),
    sequences S (uint64), document indices S + 1 (uint64),
    length of each sequence (S x int32), its byte offset (S x int64), document indices 0, 1, ... S (int64)

OLMo: `PREFIX.npy`, the tokens alone as uint16; despite the name it has no NumPy header
(`olmo.data.memmap_dataset.MemMapDataset`). All numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from polycom_ext.data.shards import read_array
from polycom_ext.data.token_files import MEGATRON_MAGIC, MEGATRON_TYPES
from polycom_ext.errors import PolycomError

SUFFIXES = {"megatron": (".bin", ".idx"), "olmo": (".npy",)}
"""format -> suffixes of its files"""

_MEGATRON_CODES = {np.dtype(name).newbyteorder("<").str: code for code, name in MEGATRON_TYPES.items()}


def token_dtype(format_: str, vocab_size: int) -> str:
    """NumPy's name of the type of a token.

    Megatron's is uint16 below a vocabulary of 65500 and int32 from there, as upstream's
    `DType.optimal_dtype`.

    Raises:
        PolycomError: the vocabulary does not fit into Megatron's int32 or OLMo's uint16.
    """
    if format_ == "megatron":
        if vocab_size > 1 << 31:
            raise PolycomError(
                f"a vocabulary of {vocab_size} does not fit into the 32-bit tokens of --format megatron; "
                "take a tokenizer of smaller ids"
            )
        return "<u2" if vocab_size < 65500 else "<i4"
    if vocab_size > 1 << 16:
        raise PolycomError(
            f"a vocabulary of {vocab_size} does not fit into the 16-bit tokens of --format olmo; "
            "take a tokenizer of at most 65536 tokens or --format megatron"
        )
    return "<u2"


def write_tokens(file: BinaryIO, shards: Sequence[Path]) -> None:
    """The tokens of all shards, and nothing else: `.bin` and `.npy`."""
    for shard in shards:
        file.write(read_array(shard, "tokens").tobytes())


def write_megatron_index(file: BinaryIO, shards: Sequence[Path], dtype: str, documents: int) -> None:
    """The `.idx` beside a `.bin` of these shards."""
    file.write(MEGATRON_MAGIC)
    file.write(struct.pack("<QBQQ", 1, _MEGATRON_CODES[dtype], documents, documents + 1))
    for shard in shards:
        file.write(read_array(shard, "lengths").astype("<i4").tobytes())
    offset = 0
    for shard in shards:
        sizes = read_array(shard, "lengths").astype(np.int64) * np.dtype(dtype).itemsize
        ends = offset + np.cumsum(sizes)
        file.write((ends - sizes).astype("<i8").tobytes())
        offset = int(ends[-1]) if len(ends) else offset
    block = 1 << 20
    for first in range(0, documents + 1, block):
        file.write(np.arange(first, min(first + block, documents + 1), dtype="<i8").tobytes())
