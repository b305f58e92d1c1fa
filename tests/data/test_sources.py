"""Every kind of input, and every way in which a document can be bad."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from polycom_ext.data import sources
from polycom_ext.data.sources import BadDocument, document_text, read_records
from polycom_ext.errors import PolycomError

from .conftest import read_documents, write_jsonl

Prepare = Callable[..., tuple[int, str]]


def read(path: Path, **options: str) -> list[str]:
    return [
        document_text(record, options.get("text_key", "text")) for record in read_records(path, **options)
    ]


def write(folder: Path, kind: str, texts: list[str]) -> Path:
    path = folder / f"a{kind}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if kind == ".parquet":
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=7)
    elif kind.endswith(".gz"):
        path.write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]))
    elif kind.endswith(".zst"):
        path.write_bytes(zstandard.compress(lines[:1000]) + zstandard.compress(lines[1000:]))
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".jsonl.gz", ".json.zst", ".parquet"])
def test_every_kind_gives_the_same_texts(texts: list[str], tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, texts)
    assert read(path) == texts
    positions = [record.position for record in read_records(path)]
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size


@pytest.mark.parametrize(("what", "count"), [("file", 1), ("paragraph", 3), ("line", 4)])
def test_documents_of_a_text_file(tmp_path: Path, what: str, count: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n\r\n \t\r\nthrée\n\n\n\nfour".encode())
    expected = {
        "file": ["one\r\ntwo\r\n\r\n \t\r\nthrée\n\n\n\nfour"],
        "paragraph": ["one\r\ntwo", "thrée", "four"],
        "line": ["one", "two", "thrée", "four"],
    }[what]
    assert len(expected) == count
    assert read(path, text_documents=what) == expected
    numbers = [record.where.removeprefix(str(path)) for record in read_records(path, text_documents=what)]
    assert numbers == {"file": [""], "paragraph": [":1", ":5", ":9"], "line": [":1", ":2", ":5", ":9"]}[what]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{oops", "not JSON (Expecting property name"),
        (b"[1, 2]", "a JSON list, not an object"),
        (b'{"body": "x"}', 'the object has no "text"'),
        (b'{"text": 7}', '"text" is a number, not a string'),
        (b'{"text": null}', '"text" is a null, not a string'),
        (b'{"text": "\xff"}', "invalid UTF-8 (byte 0xff)"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 100_000, "not JSON that can be read"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    ],
)
def test_bad_line_is_fatal_or_skipped_as_asked(
    prepare: Prepare, texts: list[str], tokenizer: Path, tmp_path: Path, line: bytes, reason: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:10], b"\n", line + b"\n", *lines[10:]]))
    status, printed = prepare(path, "--output", tmp_path / "out", "--tokenizer", tokenizer)
    assert status == 2
    assert f"{path}:12: " in printed
    assert reason in printed
    assert "--on-bad-line skip" in printed

    status, printed = prepare(
        path, "--output", tmp_path / "out", "--tokenizer", tokenizer, "--on-bad-line", "skip"
    )
    assert status == 0
    assert "1 bad documents skipped" in printed
    assert (tmp_path / "out.skipped.txt").read_text().startswith(f"{path}:12: ")
    assert json.loads((tmp_path / "out.json").read_text())["skipped"] == 1
    assert len(read_documents(tmp_path / "out")) == len(texts)


def test_empty_documents_are_counted_and_left_out(
    prepare: Prepare, texts: list[str], tokenizer: Path, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["", *texts, " \n\t"])
    status, printed = prepare(path, "--output", tmp_path / "out", "--tokenizer", tokenizer)
    assert status == 0
    assert "2 empty documents left out" in printed
    assert len(read_documents(tmp_path / "out")) == len(texts)


def test_empty_file_among_others_is_skipped_if_asked(
    prepare: Prepare, texts: list[str], tokenizer: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.txt.gz"
    empty.write_bytes(gzip.compress(b""))
    arguments = (
        empty,
        write_jsonl(tmp_path / "a.jsonl", texts),
        "--output",
        tmp_path / "out",
        "--tokenizer",
        tokenizer,
    )
    status, printed = prepare(*arguments)
    assert (status, f"{empty}: the file holds no documents" in printed) == (2, True)
    assert prepare(*arguments, "--on-bad-line", "skip")[0] == 0
    assert json.loads((tmp_path / "out.json").read_text())["skipped"] == 1


def test_parquet_column_and_rows_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    bytes_ = pa.array([b"fine", b"\xff", None], pa.binary()).view(pa.string())
    pq.write_table(
        pa.table({"text": bytes_, "id": [1, 2, 3], "kind": pa.array(["x", "y", "x"]).dictionary_encode()}),
        path,
    )
    with pytest.raises(PolycomError, match="has no column body; choose of text, id, kind"):
        read(path, text_key="body")
    with pytest.raises(PolycomError, match="has no column \udce9; choose of text, id, kind"):
        read(path, text_key="\udce9")
    with pytest.raises(PolycomError, match=r"column id of .* is of type int64"):
        read(path, text_key="id")
    assert read(path, text_key="kind") == ["x", "y", "x"]
    fine, invalid, null = read_records(path)
    assert document_text(fine) == "fine"
    assert (invalid.where, null.where) == (f"{path}:row 2", f"{path}:row 3")
    with pytest.raises(BadDocument, match="invalid UTF-8"):
        document_text(invalid)
    with pytest.raises(BadDocument, match="text is null"):
        document_text(null)


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_damaged_file_is_named_not_taken_for_a_short_one(
    texts: list[str], tmp_path: Path, kind: str, damage: str
) -> None:
    path = write(tmp_path, kind, texts)
    path.write_bytes(path.read_bytes()[:-30] if damage == "cut" else b"plain text\n" * 20)
    with pytest.raises(PolycomError, match=f"{path} is damaged or not"):
        read(path)


def zstd(data: bytes, window_log: int, checksum: bool = True) -> bytes:
    """One frame, as `zstd --long=WINDOW_LOG` writes a stream."""
    parameters = zstandard.ZstdCompressionParameters(
        compression_level=3, window_log=window_log, write_checksum=checksum
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame: bytes = compressor.compress(data) + compressor.flush()
    return frame


@pytest.mark.parametrize("window_log", [28, 31])
def test_zstd_frames_of_any_window_are_read(texts: list[str], tmp_path: Path, window_log: int) -> None:
    lines = write_jsonl(tmp_path / "plain.jsonl", texts).read_bytes()
    skippable = b"\x50\x2a\x4d\x18\x05\x00\x00\x00hello"
    frames = [zstd(lines[:7000], 17), zstd(lines[7000:20_000], window_log), skippable, zstd(b"", 20)]
    assert zstandard.get_frame_parameters(frames[1]).window_size == 1 << window_log
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join([*frames, zstd(lines[20_000:], window_log, checksum=False)]))
    assert read(path) == texts


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst"])
def test_file_cut_anywhere_is_named(tmp_path: Path, kind: str) -> None:
    line = b'{"text": "one"}\n'
    compress = {".jsonl.gz": gzip.compress, ".jsonl.zst": lambda data: zstd(data, 28)}[kind]
    first, second = compress(line), compress(line * 2)
    path = tmp_path / f"a{kind}"
    for length in range(len(first) + 1, len(first + second)):
        path.write_bytes((first + second)[:length])
        with pytest.raises(PolycomError, match=f"{path} is damaged or not"):
            read(path)
    path.write_bytes(first + second)
    assert read(path) == ["one"] * 3


def test_gzip_padded_with_zeros_is_whole(texts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl.gz", texts)
    path.write_bytes(path.read_bytes() + bytes(1000))
    assert read(path) == texts
    path.write_bytes(path.read_bytes() + b"rest")
    with pytest.raises(PolycomError, match=f"{path} is damaged or not gzip"):
        read(path)


def test_parquet_column_of_a_name_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["text", "text", "body"]), path)
    with pytest.raises(PolycomError, match=f"{path} has 2 columns text; rename one, or choose another with"):
        read(path)
    assert read(path, text_key="body") == ["c"]


def test_parquet_damaged_anywhere_is_one_sentence(tmp_path: Path, texts: list[str]) -> None:
    whole = write(tmp_path, ".parquet", texts).read_bytes()
    path = tmp_path / "b.parquet"
    for position in range(0, len(whole), len(whole) // 60):
        damaged = bytearray(whole)
        damaged[position : position + 8] = bytes(byte ^ 0xFF for byte in whole[position : position + 8])
        path.write_bytes(damaged)
        said = str(path)
        with contextlib.suppress(BadDocument):  # or nothing: Arrow writes no checksums
            try:
                read(path)
            except PolycomError as error:
                said = str(error)
        assert str(path) in said
        assert "\n" not in said


def test_parquet_rows_of_megabytes_are_not_held_together(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = pa.table({"text": [os.urandom(1 << 19).hex() for _ in range(96)]})
    with pq.ParquetWriter(path, rows.schema, use_dictionary=False, write_batch_size=4) as writer:
        writer.write_table(rows)
    assert pq.ParquetFile(path).num_row_groups == 1
    default = pa.default_memory_pool()  # what was set last: ask before
    pool = pa.proxy_memory_pool(default)
    try:
        pa.set_memory_pool(pool)
        assert sum(len(record.data) for record in read_records(path)) == 96 << 20
    finally:
        pa.set_memory_pool(default)
    assert 16 << 20 < pool.max_memory() < 64 << 20


@pytest.mark.parametrize(
    ("name", "what", "where"),
    [("a.jsonl", "file", ":2"), ("a.txt", "file", ""), ("a.txt", "line", ":2"), ("a.txt", "paragraph", ":1")],
)
def test_a_document_is_bounded_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str, where: str
) -> None:
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 1000)
    path = tmp_path / name
    short = '{"text": "fine"}'
    path.write_text(f"{short}\n{'x' * 2500}\n\n{short}\n")
    records = list(read_records(path, text_documents=what))
    (bad,) = [record for record in records if record.problem]
    assert bad.where == f"{path}{where}"
    assert "more than" in bad.problem
    assert bad.data == b""
    if what != "file" or name != "a.txt":
        assert records[-1].data == short.encode()
