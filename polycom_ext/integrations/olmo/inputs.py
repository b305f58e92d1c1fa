"""Tokenizer, token files and remote folders of a TrainConfig: there, readable, and enough. Imports OLMo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from olmo.exceptions import OLMoConfigurationError
from olmo.tokenizer import Tokenizer

from polycom_ext.errors import PolycomError

CLIENTS = ("botocore", "boto3", "google", "requests", "urllib3", "cached_path")
"""Packages that reach what is remote; each raises errors of its own."""


def check_tokenizer(cfg: Any) -> None:
    """Raise PolycomError for a tokenizer that cannot be had, or whose file is none."""
    name = cfg.tokenizer.identifier
    try:
        Tokenizer.from_train_config(cfg)
    except OLMoConfigurationError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        is_path = name.startswith((".", "/")) or name.endswith(".json")
        missing = is_path and not Path(name).exists()
        raise PolycomError(f"tokenizer {name}: {'does not exist' if missing else error}") from None


def check_amount(cfg: Any, world_size: int) -> None:
    """Raise PolycomError for local token files that hold no batch of whole sequences."""
    batch = cfg.global_train_batch_size
    found = _sequences(cfg, cfg.data, _paths(cfg.data))
    if found is not None and found < batch:
        raise PolycomError(
            f"data holds {found} whole sequences of {cfg.model.max_sequence_length} tokens, fewer than "
            f"global_train_batch_size {batch}"
        )
    for evaluator in cfg.evaluators:
        if evaluator.type != "lm":
            continue
        parts = evaluator.data.datasets or {evaluator.label: evaluator.data.paths or []}
        for label, paths in parts.items():
            found = _sequences(cfg, evaluator.data, paths)
            if paths and found is not None and found < (world_size if evaluator.data.drop_last else 1):
                raise PolycomError(
                    f"evaluators: {label} holds {found} whole sequences of {cfg.model.max_sequence_length} "
                    f"tokens, too few for {world_size} processes"
                )


def _paths(data: Any) -> list[str]:
    return [*(data.paths or []), *(path for paths in (data.datasets or {}).values() for path in paths)]


def _sequences(cfg: Any, data: Any, paths: list[str]) -> int | None:
    """Whole sequences in token files: each begins anew in each file. None where one is remote."""
    if any("://" in path for path in paths):
        return None
    size = np.dtype(data.effective_memmap_dtype).itemsize * cfg.model.max_sequence_length
    try:
        return sum(Path(path).stat().st_size // size for path in paths)
    except FileNotFoundError as error:
        raise PolycomError(f"data: {error.filename} does not exist") from None
    except OSError as error:
        raise PolycomError(f"data: {error.filename} cannot be read: {error.strerror}") from None


@contextmanager
def reaching(what: str) -> Iterator[None]:
    """Raise PolycomError for what a client of remote storage raises, such as missing credentials."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in CLIENTS:
            raise
        raise PolycomError(f"{what}: {error}") from None
