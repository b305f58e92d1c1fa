"""The toy trainer's form of token files, for people to read: `PREFIX.tokens`, a document a line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from polycom_ext.data.formats import TokenFormat, Tokens


def token_dtype(vocab_size: int) -> str:
    return "<u4"


def write_lines(tokens: Tokens, file: BinaryIO) -> None:
    ids: Iterator[int] = (id_ for piece in tokens.pieces() for id_ in piece.tolist())
    for lengths in tokens.lengths():
        for length in lengths.tolist():
            file.write(" ".join(str(next(ids)) for _ in range(length)).encode() + b"\n")


LINES = TokenFormat(
    summary="a document a line, PREFIX.tokens", files={".tokens": write_lines}, dtype=token_dtype
)
