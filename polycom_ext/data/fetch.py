"""`polycom data fetch`: a recipe's files, downloaded, tokenized and mixed, by several processes and nodes.

Each file is a part by itself: fetched, made into one data set, thrown away. How far a part is can be seen
from what lies in the folder, so whoever gives the command again goes on there, and any number of nodes may
give it at once: a part is made by whoever holds its lock. The mixture is written when all parts are there.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from polycom_ext.data import listing, mixture
from polycom_ext.data.aside import Aside
from polycom_ext.data.download import Downloads, Remote, Stopped
from polycom_ext.data.listing import Listing, Part, hub_url
from polycom_ext.data.progress import progress
from polycom_ext.data.recipe import Recipe
from polycom_ext.data.settings import Settings
from polycom_ext.data.streams import COMPRESSIONS, DamagedError
from polycom_ext.data.tokenizer import Encoder
from polycom_ext.errors import PolycomError
from polycom_ext.files import atomic, lock, sha256

DOWNLOADS = 4
"""Files under way at once, beside those that are being tokenized."""
TOKENS_A_BYTE = {True: 1.0, False: 0.35}
"""More than any text of ours gives: compressed or not. For the room that a disk must have."""
NODES = (("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), ("RANK", "WORLD_SIZE"))
"""Where a launcher says which of how many a process is.

Slurm's batch script is alone, and has SLURM_PROCID, and SLURM_NTASKS of the whole job, too: the number of a
step's tasks is what srun adds.
"""


@dataclass(frozen=True)
class Order:
    """What to fetch, and how."""

    recipe: Recipe
    output: Path
    format: str
    share: float = 1.0
    tokenizer: Path | None = None
    mirror: str | None = None
    workers: int = 1
    keep_raw: bool = False

    def data_set(self, part: Part) -> Path:
        """The prefix of the data set of a part."""
        return self.output / part.name


def fetch(order: Order, downloads: Downloads) -> list[Part]:
    """Make what is not there yet of a corpus; return the parts that are left to other nodes.

    Raises:
        PolycomError: a file cannot be had, the folder is of another order, or the disk has no room for it.
    """
    found = listing.settled(order.recipe, order.output, order.share, downloads)
    with _alone(order):
        tokenizer = _tokenizer(order, downloads)
    digest, eos = sha256(tokenizer), Encoder(tokenizer, order.recipe.tokenizer.eos).eos
    missing = []
    for part in found.parts:
        if mixture.made(order.data_set(part), digest) is None:
            missing.append(part)
        elif not order.keep_raw:
            downloads.discard(part.file)
    node, nodes = _node(os.environ)
    mine = [part for part in missing if part.index % nodes == node]
    _check_room(order, mine, downloads)
    _Work(order, downloads, tokenizer, digest, eos).make(mine)
    if node == 0:
        with _alone(order):
            for label, url in order.recipe.validation.sets.items():
                _validation(order, label, Remote(url), downloads)
    return _finished(order, found, digest)


def _finished(order: Order, found: Listing, digest: str) -> list[Part]:
    """Write the mixture if all is there; return what is not."""
    left = [part for part in found.parts if mixture.made(order.data_set(part), digest) is None]
    labels = order.recipe.validation.sets
    if not left and all(
        mixture.is_there(order.output / "validation" / label, order.format) for label in labels
    ):
        mixture.write(order.recipe, found, order.output, order.format)
        shutil.rmtree(order.output / ".claims", ignore_errors=True)
        if not order.keep_raw:
            shutil.rmtree(order.output / "raw", ignore_errors=True)
    return left


class _Work:
    """Makes parts, several at a time: a thread leads one from its download to its data set."""

    def __init__(self, order: Order, downloads: Downloads, tokenizer: Path, digest: str, eos: str) -> None:
        self._order, self._downloads = order, downloads
        self._tokenizer, self._digest, self._eos = tokenizer, digest, eos
        self._at_once = self._workers = 1
        self._downloading = threading.Semaphore(DOWNLOADS)
        self._aside = Aside()

    def make(self, parts: list[Part]) -> None:
        if not parts:
            return
        self._at_once = min(self._order.workers, len(parts))
        self._workers = max(self._order.workers // len(parts), 1)
        self._tokenizing = threading.Semaphore(self._at_once)
        # Downloads run ahead by so many files, which bounds what lies in `raw`.
        with (
            ThreadPoolExecutor(self._at_once + DOWNLOADS) as pool,
            progress(len(parts), "fetching", "files") as bar,
        ):
            try:
                for future in as_completed([pool.submit(self._part, part) for part in parts]):
                    future.result()
                    bar.update()
            except BaseException:
                self._downloads.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                self._aside.end()
                raise

    def _part(self, part: Part) -> None:
        claim = self._order.output / ".claims" / part.name.replace("/", ".")
        claim.parent.mkdir(parents=True, exist_ok=True)
        with claim.open("wb") as held:
            if not lock(held) or mixture.made(self._order.data_set(part), self._digest) is not None:
                return
            with self._downloading:
                raw = self._downloads.get(part.file)
            with self._tokenizing:
                try:
                    self._tokenize(part, raw)
                except DamagedError:
                    if self._downloads.local or part.file.sha256 is not None:
                        raise  # it is what was published
                    before = sha256(raw)
                    self._downloads.discard(part.file)
                    raw = self._downloads.get(part.file)
                    if sha256(raw) == before:
                        raise
                    self._tokenize(part, raw)
            if not self._order.keep_raw:
                self._downloads.discard(part.file)

    def _tokenize(self, part: Part, raw: Path) -> None:
        """One file, one data set; bad documents are left out and counted."""
        if self._downloads.stop.is_set():
            raise Stopped
        settings = Settings(
            [raw],
            self._order.data_set(part),
            self._order.format,
            self._tokenizer,
            eos=self._eos,
            text_key=self._order.recipe.text_key,
            on_bad_line="skip",
            workers=self._workers,
            overwrite=True,
        )
        self._aside.prepare(settings)


def _tokenizer(order: Order, downloads: Downloads) -> Path:
    """The tokenizer of a corpus, in its folder.

    Raises PolycomError where that is another than the one given.
    """
    kept, said = order.output / "tokenizer.json", order.recipe.tokenizer
    if order.tokenizer is None and kept.exists():
        return kept
    given = order.tokenizer or downloads.get(Remote(hub_url(said.hub, said.file, said.revision)))
    if not given.is_file():
        raise PolycomError(f"no tokenizer file {given}; give a tokenizer.json")
    content = given.read_bytes()
    if kept.exists() and kept.read_bytes() != content:
        raise PolycomError(
            f"{order.output} was begun with another tokenizer than {given}; choose another --output"
        )
    Encoder(given, said.eos)
    if not kept.exists():
        with atomic(kept) as file:
            file.write(content)
    return kept


def _node(environment: Mapping[str, str]) -> tuple[int, int]:
    """Which node this is, of how many: what `srun` or torchrun say, else the only one."""
    for rank, size in NODES:
        with suppress(KeyError, ValueError):
            if int(environment[size]) > 1:
                return int(environment[rank]), int(environment[size])
    return 0, 1


def _check_room(order: Order, parts: list[Part], downloads: Downloads) -> None:
    """Refuse, before the first byte, what the disk has no room for."""
    sizes = [part.file.size or 0 for part in parts]
    compressed = [Path(part.file.url).suffix in COMPRESSIONS for part in parts]
    tokens = [int(2 * TOKENS_A_BYTE[kind] * size) for kind, size in zip(compressed, sizes, strict=True)]
    ahead = len(parts) if order.keep_raw else min(order.workers, len(parts)) + DOWNLOADS
    raw = 0 if downloads.local else sum(sorted(sizes)[-ahead:])
    # Shards are kept until they are put together.
    needed = sum(tokens) + sum(sorted(tokens)[-order.workers :]) + raw
    free = shutil.disk_usage(order.output).free
    if needed > free:
        raise PolycomError(
            f"{order.output} needs up to {needed / 1e9:.1f} GB for what is left to do, and its disk has "
            f"{free / 1e9:.1f} GB; make room, choose another --output, or take a --share of the files"
        )


def _validation(order: Order, label: str, file: Remote, downloads: Downloads) -> None:
    prefix, said = order.output / "validation" / label, order.recipe.validation
    if not mixture.is_there(prefix, order.format):
        mixture.write_flat(downloads.get(file), prefix, order.format, said.dtype, said.eos_id)
    if not order.keep_raw:
        downloads.discard(file)


@contextmanager
def _alone(order: Order) -> Iterator[None]:
    """One process at a time fetches what is no part."""
    with (order.output / ".small.lock").open("wb") as held:
        lock(held, wait=True)
        yield
