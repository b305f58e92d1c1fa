"""What `polycom data prepare` is asked for, and what can be seen to be wrong with it before any work."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polycom_ext import trainers
from polycom_ext.data import formats, tokenizer
from polycom_ext.data.sources import check_input
from polycom_ext.errors import PolycomError

_OWN = re.compile(r"lock|(manifest|tokenizer)\.json|output\..*|\d{8}\.npz|.*\.partial")
"""Names of what a work folder holds; it is removed when the work is done."""


@dataclass(frozen=True)
class Settings:
    """What to prepare and how.

    Exactly one of `tokenizer` (a tokenizer.json) and `train_tokenizer` (a vocabulary size) is given. Neither
    `workers` nor `shard_bytes` changes the tokens that are written.
    """

    inputs: Sequence[Path]
    output: Path
    """The prefix: `OUTPUT.json` and so on."""
    format: str = trainers.DEFAULT_FORMAT
    """As in `--format`."""
    tokenizer: Path | None = None
    train_tokenizer: int | None = None
    eos: str | None = None
    text_key: str = "text"
    text_documents: Literal["file", "paragraph", "line"] = "file"
    on_bad_line: Literal["fail", "skip"] = "fail"
    workers: int = 1
    overwrite: bool = False
    shard_bytes: int | None = None

    def path(self, suffix: str) -> Path:
        return self.output.with_name(self.output.name + suffix)

    @property
    def work(self) -> Path:
        return self.path(".work")

    @property
    def input_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.inputs)


def check(settings: Settings) -> dict[str, str]:
    """Return what decides over the tokens, by name: equal for work that may be reused.

    Raises:
        PolycomError: an input, the output, the tokenizer or a number is wrong.
    """
    if not settings.inputs:
        raise PolycomError("nothing to prepare; name at least one input file")
    if settings.workers < 1:
        raise PolycomError(f"--workers {settings.workers} is too few; give 1 or more")
    for path in settings.inputs:
        check_input(path)
    _check_output(settings)
    origin, eos, vocab_size = _tokenizer(settings)
    formats.find(settings.format).dtype(vocab_size)
    return {
        "format": settings.format,
        "tokenizer": origin,
        "eos": eos,
        "text_key": settings.text_key,
        "text_documents": settings.text_documents,
    }


def _check_output(settings: Settings) -> None:
    output = settings.output
    if output.name in ("", ".."):
        raise PolycomError(f"--output {output} names no files; it is a prefix, such as {output / 'train'}")
    if (
        output.is_dir() and not settings.path(".json").exists()
    ):  # a trainer may keep its own beside what is made
        raise PolycomError(f"{output} is a directory; --output is a prefix, such as {output / 'train'}")
    read = {path.resolve() for path in (*settings.inputs, settings.tokenizer) if path is not None}
    for suffix in (*formats.find(settings.format).files, ".json", ".tokenizer.json", ".skipped.txt"):
        path = settings.path(suffix)
        if path.resolve() in read:
            raise PolycomError(f"the output {path} would replace an input; choose another --output")
        if path.is_dir():  # says too, now and not at the end, that the name is too long
            raise PolycomError(f"{path} is a directory, where a file would go; choose another --output")
    for path in settings.work.iterdir() if settings.work.is_dir() else ():
        if not _OWN.fullmatch(path.name):
            raise PolycomError(
                f"{path} is in the way, in the folder for what is begun; choose another --output, or move it"
            )


def _tokenizer(settings: Settings) -> tuple[str, str, int]:
    """Where the tokenizer comes from, its end-of-document token and the size of its vocabulary, at most."""
    size = settings.train_tokenizer
    if (settings.tokenizer is None) == (size is None):
        raise PolycomError(
            "give a tokenizer file (--tokenizer) or a size to train one of (--train-tokenizer)"
        )
    if settings.tokenizer is not None:
        encoder = tokenizer.Encoder(settings.tokenizer, settings.eos)
        return encoder.sha256, encoder.eos, encoder.vocab_size
    assert size is not None
    tokenizer.check_vocabulary(size)
    if settings.eos not in (None, tokenizer.EOS):
        raise PolycomError(f"a tokenizer trained here ends documents with {tokenizer.EOS}; leave --eos out")
    return f"trained to {size}", tokenizer.EOS, size
