"""The token files of a Megatron spec, and what the trainer will take them for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from polycom_ext.data.token_files import Model
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron import blends, token_format
from polycom_ext.runs.spec import Spec

EOD_OPTIONS = ("reset-position-ids", "reset-attention-mask", "eod-mask-loss")
"""Options that look for the end-of-document token."""


def check(spec: Spec) -> None:
    """Raise PolycomError for token files that are not there, or that the model would read wrongly."""
    if not any(spec.options.get(name) for name in (*blends.OPTIONS, *blends.FILE_OPTIONS, "mock-data")):
        raise PolycomError(f"{spec.name}: megatron.train-data-path must name token files (or set mock-data)")
    for name in blends.FILE_OPTIONS:
        path = spec.options.get(name)
        if path is not None and not Path(str(path)).exists():
            raise PolycomError(f"{spec.name}: megatron.{name}: {path} not found (looked in {Path.cwd()})")
    prefixes = list(_prefixes(spec))
    for name, prefix in prefixes:
        missing = [file for file in (f"{prefix}.bin", f"{prefix}.idx") if not Path(file).exists()]
        if missing:
            raise PolycomError(
                f"{spec.name}: megatron.{name}: {' and '.join(missing)} not found "
                f"(looked in {Path.cwd()}); `polycom data` makes token files"
            )
    problem = token_format.problem([prefix for _, prefix in prefixes], _tokens(spec))
    if problem:
        raise PolycomError(f"{spec.name}: {problem}")


def _prefixes(spec: Spec) -> Iterator[tuple[str, str]]:
    """Option and prefix of every local data set, of those too that a file named in the spec lists."""
    for name in (*blends.OPTIONS, *blends.FILE_OPTIONS):
        given = blends.words(spec.options.get(name)) or []
        listed = _listed(spec, name) if given and name in blends.FILE_OPTIONS else [given]
        for blend in listed:
            for prefix in blends.prefixes(blend):
                if "://" not in prefix:
                    yield name, prefix


def _listed(spec: Spec, name: str) -> list[list[str]]:
    """The blends that upstream reads in such a file."""
    path = Path(str(spec.options[name]))
    try:
        return list(blends.read(name, path).values())
    except blends.UNREADABLE as error:
        raise PolycomError(f"{spec.name}: megatron.{name}: {path} cannot be read ({error})") from None


def _tokens(spec: Spec) -> Model:
    """What the trainer is told of tokens; a tokenizer that it loads says the rest.

    NullTokenizer ends documents with `vocab-size`, which it adds to the vocabulary: the last id, as in the
    tokenizers that `polycom data prepare` trains.
    """
    options = spec.options
    size, tokenizer = options.get("vocab-size"), options.get("tokenizer-model")
    if options.get("tokenizer-type") not in ("NullTokenizer", "NullMultimodalTokenizer"):
        path = Path(tokenizer) if isinstance(tokenizer, str) else None
        padded = options.get("padded-vocab-size")
        return Model(
            padded if isinstance(padded, int) else None, "megatron.padded-vocab-size", tokenizer=path
        )
    if not isinstance(size, int):
        return Model(None, "")
    asks_for_eod = any(options.get(name) for name in EOD_OPTIONS)
    name = "NullTokenizer's megatron.vocab-size"
    return Model(size + 1, f"{name} + 1 =", size if asks_for_eod else None, name)
