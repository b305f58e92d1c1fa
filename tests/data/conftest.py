"""A small text of many scripts, a tokenizer trained on it, and the command line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from polycom_ext.cli import main
from polycom_ext.data.tokenizer import train

SENTENCE = (
    "the sea of thought, naïve Ωmega 语言 модель 🌊 rolls (on) and 'twas 1623 — again; never-ending\n\n then"
)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """60 documents of 1 to 400 words."""
    generator, words = random.Random(7), SENTENCE.split(" ")
    return [" ".join(generator.choices(words, k=generator.randint(1, 400))) for _ in range(60)]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train(texts, 320))
    return path


@pytest.fixture
def prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`polycom data prepare ARGUMENTS`, by one process unless told: exit status and what it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        workers = () if "--workers" in arguments else ("--workers", 1)
        capsys.readouterr()
        status = main(["data", "prepare", *map(str, (*arguments, *workers))])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read_documents(prefix: Path, suffix: str = ".bin") -> list[list[int]]:
    """The token lists of a data set, split after each end-of-document token."""
    metadata = json.loads(prefix.with_name(prefix.name + ".json").read_text())
    tokens = np.memmap(prefix.with_name(prefix.name + suffix), dtype=metadata["dtype"], mode="r")
    ends = np.flatnonzero(tokens == metadata["eos_id"]) + 1
    return [part.tolist() for part in np.split(tokens, ends)[:-1]]
