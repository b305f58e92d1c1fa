"""`polycom data prepare`: documents -> token files, by several processes, resumable.

Everything is first made in `PREFIX.work/` (a manifest, the tokenizer, the shards) and put in place at the
end, each file by one rename, `PREFIX.json` last: where that file is, the others are whole. A run that was
killed goes on when the same command is given again.
"""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tokenizers

from polycom_ext._version import __version__
from polycom_ext.data import formats, manifest, shards, tokenizer
from polycom_ext.data.progress import progress
from polycom_ext.data.settings import Settings, check
from polycom_ext.data.sources import BadDocument, document_text, read_records
from polycom_ext.errors import PolycomError
from polycom_ext.files import atomic, exclusive

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def prepare(settings: Settings) -> manifest.Manifest:
    """Write the token files and return what `PREFIX.json` holds.

    Documents keep the order of the inputs, each ends with the end-of-document token, empty ones are left
    out. If the same was prepared before, from the same inputs, nothing is done.

    Raises:
        PolycomError: an input, the tokenizer or a setting is wrong; a document is bad and `on_bad_line` is
            "fail"; the prefix holds something else and `overwrite` is not set; a file cannot be read or
            written.
    """
    try:
        wanted = check(settings)
        with exclusive(settings.work):
            try:
                return _prepare(settings, wanted)
            finally:
                if not any(settings.work.glob("*.npz")) and not (settings.work / "tokenizer.json").exists():
                    shutil.rmtree(settings.work, ignore_errors=True)
    except OSError as error:
        way_out = "; make room, then the same command goes on" if error.errno in NO_ROOM else ""
        raise PolycomError(
            f"{error.filename or settings.output}: {error.strerror or error}{way_out}"
        ) from None


@dataclass
class _Totals:
    """Sums over all shards."""

    shards: int = 0
    documents: int = 0
    tokens: int = 0
    empty_documents: int = 0
    skipped: int = 0


def _prepare(settings: Settings, wanted: dict[str, str]) -> manifest.Manifest:
    finished = manifest.read(settings.path(".json"))
    begun = manifest.read(settings.work / "manifest.json")
    inputs = manifest.fingerprints(settings.inputs, [known for known in (finished, begun) if known])
    identity: manifest.Manifest = {"settings": wanted, "inputs": inputs}
    if finished is not None:
        problem = _problem(settings, finished, identity)
        if not problem:
            shutil.rmtree(settings.work)
            return finished
        if not settings.overwrite:
            raise PolycomError(f"{problem}; add --overwrite to prepare it anew, or choose another --output")
    _begin(settings, begun, identity)

    tokenizer_file = settings.tokenizer or _trained_tokenizer(settings)
    encoder = tokenizer.Encoder(tokenizer_file, wanted["eos"])
    dtype = formats.find(settings.format).dtype(encoder.vocab_size)
    job = shards.Job(settings.work, tokenizer_file, encoder.eos, settings.text_key, dtype)
    totals = _tokenize(settings, job)
    now = {**identity, "inputs": manifest.fingerprints(settings.inputs, [identity])}
    if manifest.difference(identity, now):
        raise PolycomError(
            "an input changed while it was read; prepare again, with --overwrite, when it is complete"
        )
    if not totals.documents:
        raise PolycomError(
            f"nothing to write: {totals.empty_documents} documents are empty and {totals.skipped} bad; "
            "check --text-key and the inputs"
        )
    metadata = {
        "format": settings.format,
        "documents": totals.documents,
        "tokens": totals.tokens,
        "dtype": np.dtype(dtype).name,
        "vocab_size": encoder.vocab_size,
        "eos": encoder.eos,
        "eos_id": encoder.eos_id,
        "tokenizer": str(settings.tokenizer or settings.path(".tokenizer.json").name),
        "tokenizer_sha256": encoder.sha256,
        "empty_documents": totals.empty_documents,
        "skipped": totals.skipped,
        **identity,
        "versions": {"polycom-ext": __version__, "tokenizers": tokenizers.__version__},
    }
    metadata["files"] = _publish(settings, job, totals, finished)
    # Last, because it vouches for the other files.
    manifest.write(settings.path(".json"), metadata, settings.work / "output.json")
    shutil.rmtree(settings.work)
    return metadata


def _problem(settings: Settings, finished: manifest.Manifest, identity: manifest.Manifest) -> str:
    """Why what is there is not what is wanted; empty if it is."""
    changes = manifest.difference(finished, identity)
    if changes:
        return f"{settings.output} was prepared with {changes}"
    for suffix, size in finished["files"].items():
        path = settings.path(suffix)
        if not path.is_file() or path.stat().st_size != size:
            return f"{path} is missing or damaged"
    if finished["skipped"] and settings.on_bad_line == "fail":
        return (
            f"{settings.output} was prepared without {finished['skipped']} bad documents, which are fatal now"
        )
    return ""


def _begin(settings: Settings, begun: manifest.Manifest | None, identity: manifest.Manifest) -> None:
    """Make the work folder ready: as a run with the same settings left it, or fresh."""
    size = _shard_bytes(settings)
    new = {"settings": {**identity["settings"], "shard_bytes": size}, "inputs": identity["inputs"]}
    if begun is not None:
        changes = manifest.difference(begun, new)
        done = sum(1 for _ in settings.work.glob("*.npz"))
        if not changes:
            if done:
                print(f"going on with {settings.output}: {done} shards are done", file=sys.stderr)
            return
        if done and not settings.overwrite:
            raise PolycomError(
                f"{settings.output} was begun with {changes}; "
                "add --overwrite to begin anew, or choose another --output"
            )
        for path in settings.work.iterdir():
            if path.name != "lock":
                path.unlink()
    elif not settings.overwrite:
        also = [".tokenizer.json"] if settings.train_tokenizer is not None else []
        also += [".skipped.txt"] if settings.on_bad_line == "skip" else []
        for suffix in (*formats.find(settings.format).files, *also):
            if settings.path(suffix).exists():
                raise PolycomError(
                    f"{settings.path(suffix)} is in the way; add --overwrite or choose another --output"
                )
    manifest.write(settings.work / "manifest.json", new)


def _shard_bytes(settings: Settings) -> int:
    return settings.shard_bytes or shards.shard_bytes(settings.input_bytes)


def _trained_tokenizer(settings: Settings) -> Path:
    """Train the tokenizer, unless a run that was killed did; it stays in the work folder until the end."""
    assert settings.train_tokenizer is not None
    path = settings.work / "tokenizer.json"
    if not path.exists():
        with progress(settings.input_bytes, "training the tokenizer") as bar:
            content = tokenizer.train(_texts(settings, bar.update), settings.train_tokenizer)
        with atomic(path) as file:
            file.write(content)
        size = tokenizer.Encoder(path).vocab_size
        if size < settings.train_tokenizer:
            print(
                f"the text is too small for {settings.train_tokenizer} tokens; the vocabulary is {size}",
                file=sys.stderr,
            )
    return path


def _texts(settings: Settings, advance: Callable[[int], object]) -> Iterator[str]:
    for path in settings.inputs:
        position = 0
        for record in read_records(path, settings.text_key, settings.text_documents):
            try:
                yield document_text(record, settings.text_key)
            except BadDocument as error:
                if settings.on_bad_line == "fail":
                    raise _bad_line(f"{record.where}: {error}") from None
            advance(record.position - position)
            position = record.position


def _tokenize(settings: Settings, job: shards.Job) -> _Totals:
    totals, position = _Totals(), 0
    chunks = shards.chunks(
        settings.inputs, settings.text_key, settings.text_documents, _shard_bytes(settings)
    )
    made = shards.make_shards(chunks, job, settings.workers)
    with progress(settings.input_bytes, "tokenizing") as bar, closing(made):
        for chunk, summary in made:
            if summary.skipped and settings.on_bad_line == "fail":
                raise _bad_line(summary.skipped[0])
            totals.shards += 1
            totals.documents += summary.documents
            totals.tokens += summary.tokens
            totals.empty_documents += summary.empty_documents
            totals.skipped += len(summary.skipped)
            bar.update(chunk.position - position)
            position = chunk.position
    return totals


def _bad_line(line: str) -> PolycomError:
    return PolycomError(f"{line}; mend it, or leave bad documents out with --on-bad-line skip")


def _publish(
    settings: Settings, job: shards.Job, totals: _Totals, replaced: manifest.Manifest | None
) -> dict[str, int]:
    """Write the output files in the work folder, then rename them into place; return suffix -> size.

    Files of a data set that is `replaced` go first, its metadata before all: it never vouches for others.
    """
    paths = [job.path(index) for index in range(totals.shards)]
    tokens = formats.Tokens(
        job.dtype,
        totals.documents,
        pieces=lambda: (shards.read_array(path, "tokens") for path in paths),
        lengths=lambda: (shards.read_array(path, "lengths") for path in paths),
    )
    writers: dict[str, Callable[[BinaryIO], object]] = {
        suffix: partial(write, tokens) for suffix, write in formats.find(settings.format).files.items()
    }
    if settings.train_tokenizer is not None:
        writers[".tokenizer.json"] = lambda file: file.write(job.tokenizer.read_bytes())
    if totals.skipped:
        writers[".skipped.txt"] = lambda file: shards.write_skipped(file, paths)

    made = {suffix: settings.work / f"output{suffix}" for suffix in writers}
    for suffix, write in writers.items():
        with atomic(made[suffix]) as file:
            write(file)
    if replaced is not None:
        settings.path(".json").unlink()
        for suffix in replaced["files"]:
            settings.path(suffix).unlink(missing_ok=True)
    sizes = {suffix: path.stat().st_size for suffix, path in made.items()}
    for suffix, path in made.items():
        path.replace(settings.path(suffix))
    return sizes
