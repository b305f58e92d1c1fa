"""Documents as they lie in text, JSON Lines and Parquet files, read as streams.

Reading is kept apart from decoding (`document_text`), so that one process reads in order while many decode
and tokenize, and so that a bad line is only named here, not judged: whether it ends the run is the caller's
choice.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from polycom_ext.data.streams import DamagedError, cannot_read, kind_of, opened
from polycom_ext.errors import PolycomError

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

MAX_DOCUMENT_BYTES = 16 << 20
"""Longest document: `tokenizers` needs about 140 bytes of memory for each byte of one text."""


BATCH_BYTES, BATCH_ROWS = 16 << 20, 1024
"""Rows of a Parquet file that are held at a time: so many bytes of an average row group, so many at most."""


class BadDocument(Exception):
    """A record that gives no tokens; the message says why, the record says where."""


@dataclass(frozen=True)
class Record:
    """One document, not yet decoded."""

    where: str
    """`FILE:LINE`, `FILE:row N` (from 1) or, where a whole file is one document, `FILE`."""
    data: bytes
    is_json: bool
    position: int
    """Bytes of the file, as stored, that were read so far: for a progress bar."""
    problem: str = ""
    """Why there is no `data`, if there is none."""


def check_input(path: Path) -> None:
    """Refuse what cannot be read at all.

    Raises:
        PolycomError: `path` is missing, a directory, or of an unknown kind.
    """
    if path.is_dir():
        raise PolycomError(f"{path} is a directory; name its files, for example {path}/*.jsonl")
    if not path.exists():
        raise PolycomError(f"no file {path}; check the name of the input")
    if not path.is_file():
        raise PolycomError(
            f"{path} is not a regular file; inputs are read more than once, so save it to one first"
        )
    kind, compression = kind_of(path)
    if kind not in SUFFIXES or (kind == ".parquet" and compression):
        raise PolycomError(
            f"{path} is of an unknown kind; inputs end in .txt, .jsonl or .json (one object a line), "
            "each plain, .gz or .zst, or in .parquet"
        )


def read_records(path: Path, text_key: str = "text", text_documents: str = "file") -> Iterator[Record]:
    """Yield the documents of one file in order, holding one of them in memory.

    Of a Parquet file some rows are held, and the page in which they lie, stored and decompressed: pages are
    as large as their writer made them, with Arrow's defaults up to 1024 rows.

    Args:
        path: a file that `check_input` accepts.
        text_key: the Parquet column; JSON objects are decoded later, by `document_text`.
        text_documents: what a document is in a .txt file: the whole "file", a "paragraph" (lines up to a
            blank
            one) or a "line". Blank lines of .txt and JSON Lines files are not documents.

    Raises:
        PolycomError: the file cannot be read on: damaged compression, not Parquet, no such column (or two).
    """
    kind, _ = kind_of(path)
    if kind == ".parquet":
        records = _parquet_rows(path, text_key)
    elif kind != ".txt":
        records = _lines(path, is_json=True)
    elif text_documents == "paragraph":
        records = _paragraphs(path)
    elif text_documents == "line":
        records = _lines(path, is_json=False)
    else:
        records = _whole_file(path)
    found = False
    for record in records:
        found = True
        yield record
    if not found:
        yield Record(str(path), b"", False, path.stat().st_size, problem="the file holds no documents")


def document_text(record: Record, text_key: str = "text") -> str:
    """The text of one record.

    Raises:
        BadDocument: it is not UTF-8, not JSON, or has no string at `text_key`.
    """
    if record.problem:
        raise BadDocument(record.problem)
    try:
        text = record.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocument(f"invalid UTF-8 (byte 0x{record.data[error.start]:02x})") from None
    if not record.is_json:
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadDocument(f"not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"not JSON that can be read ({error})") from None
    if not isinstance(value, dict):
        raise BadDocument(f"a JSON {_json_type(value)}, not an object")
    if text_key not in value:
        raise BadDocument(f'the object has no "{text_key}"')
    text = value[text_key]
    if not isinstance(text, str):
        raise BadDocument(f'"{text_key}" is a {_json_type(text)}, not a string')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadDocument(f'"{text_key}" has half of a surrogate pair, which is not Unicode text') from None
    return text


def _whole_file(path: Path) -> Iterator[Record]:
    with opened(path) as (stream, stored):
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
        if len(data) > MAX_DOCUMENT_BYTES:
            problem = f"{_too_long()}; split the file with --text-documents paragraph (or line)"
            yield Record(str(path), b"", False, path.stat().st_size, problem)
        elif data:
            yield Record(str(path), data.removeprefix(b"\xef\xbb\xbf"), False, stored.tell())


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes | None, int]]:
    """Line number from 1, the line (None if it is too long) and the position."""
    with opened(path) as (stream, stored):
        number = 0
        while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) <= MAX_DOCUMENT_BYTES:
                yield number, line, stored.tell()
                continue
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_DOCUMENT_BYTES)
            yield number, None, stored.tell()


def _lines(path: Path, is_json: bool) -> Iterator[Record]:
    for number, line, position in _numbered_lines(path):
        if line is None:
            yield Record(f"{path}:{number}", b"", is_json, position, problem=_too_long())
        elif line.strip():
            yield Record(f"{path}:{number}", line.rstrip(b"\r\n"), is_json, position)


def _paragraphs(path: Path) -> Iterator[Record]:
    first, size = 0, 0
    lines: list[bytes] = []
    end = (0, b"", path.stat().st_size)
    for number, line, position in itertools.chain(_numbered_lines(path), [end]):
        if line is None or line.strip():
            first = first or number
            size += MAX_DOCUMENT_BYTES + 1 if line is None else len(line)
            if line is not None and size <= MAX_DOCUMENT_BYTES:
                lines.append(line)
            continue
        if first:
            where = f"{path}:{first}"
            if size > MAX_DOCUMENT_BYTES:
                yield Record(where, b"", False, position, problem=_too_long())
            else:
                yield Record(where, b"".join(lines).rstrip(b"\r\n"), False, position)
        first, size, lines = 0, 0, []


def _parquet_rows(path: Path, text_key: str) -> Iterator[Record]:
    number, size = 0, path.stat().st_size
    try:
        # A stream, because Arrow takes no file name that is not UTF-8, and buffered: a column of a row group
        # is not read at once.
        with path.open("rb") as stored, pq.ParquetFile(stored, buffer_size=1 << 20) as file:
            _check_column(path, file.schema_arrow, text_key)
            rows = file.metadata.num_rows
            for group in range(file.num_row_groups):
                batches = file.iter_batches(
                    batch_size=_batch_rows(file.metadata.row_group(group), text_key),
                    row_groups=[group],
                    columns=[text_key],
                    use_threads=False,
                )
                for batch in batches:
                    # As bytes: Parquet does not check that strings are UTF-8, `document_text` does.
                    for value in batch.column(0).cast(pa.large_string()).cast(pa.large_binary()):
                        data = value.as_py()
                        number += 1
                        where, position = f"{path}:row {number}", size * number // rows
                        if data is None:
                            yield Record(where, b"", False, position, problem=f"{text_key} is null")
                        elif len(data) > MAX_DOCUMENT_BYTES:
                            yield Record(where, b"", False, position, problem=_too_long())
                        else:
                            yield Record(where, data, False, position)
    except PolycomError:
        raise
    except Exception as error:  # Arrow's own, and what it lets through of a damaged schema
        if isinstance(error, OSError) and error.strerror:
            raise cannot_read(path, error) from None
        reason = str(error).partition("\n")[0]
        raise DamagedError(f"{path} is damaged or not a Parquet file ({reason}); fetch it again") from None


def _check_column(path: Path, columns: pa.Schema, text_key: str) -> None:
    found = [index for index, name in enumerate(columns.names) if name == text_key]
    if not found:
        raise PolycomError(
            f"{path} has no column {text_key}; choose of {', '.join(columns.names)} with --text-key"
        )
    if len(found) > 1:
        raise PolycomError(
            f"{path} has {len(found)} columns {text_key}; rename one, or choose another with --text-key"
        )
    type_ = columns.field(found[0]).type
    value_type = type_.value_type if pa.types.is_dictionary(type_) else type_
    if not (pa.types.is_string(value_type) or pa.types.is_large_string(value_type)):
        raise PolycomError(
            f"column {text_key} of {path} is of type {type_}; name one of strings with --text-key"
        )


def _batch_rows(group: pq.RowGroupMetaData, text_key: str) -> int:
    """How many rows of a row group make `BATCH_BYTES` of text."""
    columns = (group.column(index) for index in range(group.num_columns))
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_key)
    return min(max(BATCH_BYTES * group.num_rows // max(size, 1), 1), BATCH_ROWS)


def _too_long() -> str:
    return f"a document of more than {MAX_DOCUMENT_BYTES >> 20} MiB"


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
