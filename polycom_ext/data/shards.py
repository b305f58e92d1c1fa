"""Shards: the tokens of some megabytes of input, each made by one process and kept in one file.

Where a shard begins and ends depends on the inputs alone, never on the number of processes, and its file
appears whole or not at all; so any number of processes makes the same shards, and a killed run goes on
behind the last one.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from polycom_ext.data.sources import BadDocument, Record, document_text, read_records
from polycom_ext.data.tokenizer import Encoder
from polycom_ext.errors import PolycomError
from polycom_ext.files import atomic

MIN_SHARD_BYTES, MAX_SHARD_BYTES = 1 << 20, 16 << 20
SHARDS_WANTED = 256
"""Enough to keep many processes busy; larger inputs get larger shards, up to the maximum."""


@dataclass(frozen=True)
class Chunk:
    """The records of one shard."""

    index: int
    records: list[Record]
    position: int
    """Bytes of all inputs, as stored, up to the end of this chunk."""


@dataclass(frozen=True)
class Summary:
    """What a shard holds."""

    documents: int
    tokens: int
    empty_documents: int
    skipped: list[str]
    """`WHERE: REASON` of each record without a text."""


@dataclass(frozen=True)
class Job:
    """What each process must know to make shards."""

    folder: Path
    tokenizer: Path
    eos: str
    text_key: str
    dtype: str

    def path(self, index: int) -> Path:
        return self.folder / f"{index:08d}.npz"


def shard_bytes(total: int) -> int:
    """Input bytes of one shard, for inputs of `total` bytes."""
    return min(max(total // SHARDS_WANTED, MIN_SHARD_BYTES), MAX_SHARD_BYTES)


def chunks(inputs: Iterable[Path], text_key: str, text_documents: str, size: int) -> Iterator[Chunk]:
    """Cut the records of all inputs, in order, into chunks of at least `size` bytes."""
    index, held, before, position = 0, 0, 0, 0
    records: list[Record] = []
    for path in inputs:
        for record in read_records(path, text_key, text_documents):
            records.append(record)
            held += len(record.data)
            position = before + record.position
            if held >= size:
                yield Chunk(index, records, position)
                index, held, records = index + 1, 0, []
        before += path.stat().st_size
    if records:
        yield Chunk(index, records, position)


def make_shard(chunk: Chunk, job: Job, encode: Encoder) -> Summary:
    """Tokenize a chunk into its file."""
    documents: list[npt.NDArray[np.generic]] = []
    empty, skipped = 0, []
    for record in chunk.records:
        try:
            text = document_text(record, job.text_key)
            ids = encode(text) if text.strip() else []
        except BadDocument as error:
            skipped.append(f"{record.where}: {error}")
            continue
        if ids:
            documents.append(np.array(ids, dtype=job.dtype))
        else:
            empty += 1
    lengths = np.array([len(document) for document in documents], dtype="<i4")
    summary = Summary(len(documents), int(lengths.sum()), empty, skipped)
    archive = io.BytesIO()  # in memory, because NumPy's writer complains on stderr when a disk is full
    np.savez(
        archive,
        tokens=np.concatenate(documents) if documents else np.array([], dtype=job.dtype),
        lengths=lengths,
        summary=np.frombuffer(json.dumps(asdict(summary)).encode(), dtype=np.uint8),
    )
    with atomic(job.path(chunk.index)) as file:
        file.write(archive.getbuffer())
    return summary


def read_array(path: Path, name: str) -> npt.NDArray[np.generic]:
    """The "tokens" or the "lengths" of a shard; the other is not read."""
    with np.load(path) as archive:
        array: npt.NDArray[np.generic] = archive[name]
        return array


def read_summary(path: Path) -> Summary:
    """The summary of a shard made before."""
    return Summary(**json.loads(read_array(path, "summary").tobytes()))


def write_skipped(file: BinaryIO, paths: Iterable[Path]) -> None:
    """One line for each record without a text, of all shards."""
    for path in paths:
        lines = read_summary(path).skipped
        file.writelines(f"{line}\n".encode("utf-8", "backslashreplace") for line in lines)


def make_shards(
    all_chunks: Iterable[Chunk], job: Job, workers: int
) -> Generator[tuple[Chunk, Summary], None, None]:
    """Make the shards that do not exist yet, `workers` at a time, and yield every chunk's summary in order.

    Raises:
        PolycomError: a worker process died.
    """
    if workers == 1:
        encode = Encoder(job.tokenizer, job.eos)
        for chunk in all_chunks:
            path = job.path(chunk.index)
            yield chunk, read_summary(path) if path.exists() else make_shard(chunk, job, encode)
        return
    # A fork server, because a fork of this process would copy whatever threads it has at that moment.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job,))
    pending: deque[tuple[Chunk, Future[Summary]]] = deque()
    try:
        for chunk in all_chunks:
            path = job.path(chunk.index)
            if path.exists():
                future: Future[Summary] = Future()
                future.set_result(read_summary(path))
            else:
                future = pool.submit(_work, chunk)
            pending.append((chunk, future))
            # Bounds what lies in memory, and keeps every worker busy while the first result is awaited.
            if len(pending) >= 2 * workers:
                chunk, future = pending.popleft()
                yield chunk, future.result()
        while pending:
            chunk, future = pending.popleft()
            yield chunk, future.result()
    except BrokenProcessPool:
        raise PolycomError(
            "a worker process died, perhaps for want of memory; "
            "give the same command again, with fewer --workers, to go on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Job, Encoder] | None = None


def _start_worker(job: Job) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=end_with_parent, daemon=True).start()
    _worker = job, Encoder(job.tokenizer, job.eos)


def end_with_parent() -> None:
    """Wait for the end of the process that started this one, to end too.

    Without this, the workers of a parent killed by SIGKILL would wait for work for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work(chunk: Chunk) -> Summary:
    assert _worker is not None
    job, encode = _worker
    return make_shard(chunk, job, encode)
