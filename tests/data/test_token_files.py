"""Token files that a trainer would read wrongly are refused before it starts, those of others too."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polycom_ext.data import token_files
from polycom_ext.data.prepare import prepare
from polycom_ext.data.settings import Settings
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron.adapter import MegatronAdapter
from polycom_ext.integrations.olmo.adapter import OLMoAdapter
from polycom_ext.runs.spec import Spec

from .conftest import write_jsonl

SIZE, EOS = 320, 319
"""Of the tokenizer in conftest.py."""


@pytest.fixture(scope="module")
def made(texts: list[str], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    source = write_jsonl(folder / "a.jsonl", texts)
    prepare(Settings([source], folder / "megatron", tokenizer=tokenizer))
    prepare(Settings([source], folder / "olmo", tokenizer=tokenizer, format="olmo"))
    prepare(Settings([source], folder / "other", train_tokenizer=300))
    return folder


@pytest.fixture
def data(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, in the current directory."""
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def megatron(prefix: object = "megatron", **options: Any) -> None:
    options = {
        "tokenizer_type": "NullTokenizer",
        "vocab_size": SIZE - 1,
        "train_data_path": prefix,
        **options,
    }
    options["transformer_impl"] = "local"
    named = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
    MegatronAdapter().check_inputs(Spec("run", "megatron", "polynorm", 768, 1, {}, named))


def olmo(path: str = "olmo.npy", dtype: str | None = None, tokenizer: str = "hub/name", **model: Any) -> None:
    model = {"vocab_size": SIZE, "embedding_size": 384, "eos_token_id": EOS, "pad_token_id": EOS, **model}
    data = {"paths": [path]} if dtype is None else {"paths": [path], "memmap_dtype": dtype}
    options = {"model": model, "data": data, "tokenizer": {"identifier": tokenizer}}
    OLMoAdapter().check_inputs(Spec("run", "olmo", "polynorm", 768, 1, {}, options))


def refused(sentence: str, check: Callable[..., None], *arguments: Any, **options: Any) -> None:
    with pytest.raises(PolycomError, match=f"^run: {re.escape(sentence)}") as error:
        check(*arguments, **options)
    assert "\n" not in str(error.value)


def write_indexed(prefix: Path, tokens: np.ndarray[Any, Any], code: int) -> None:
    """A data set of one document, as Megatron's own builder writes it."""
    tokens.tofile(f"{prefix}.bin")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, 1, 2)
    Path(f"{prefix}.idx").write_bytes(header + struct.pack("<iqqq", len(tokens), 0, 0, 1))


def test_what_prepare_made_for_a_model_is_accepted(data: Path, tokenizer: Path) -> None:
    megatron()
    megatron(["0.3", "megatron", "0.7", "megatron"], vocab_size=SIZE + 5, eod_mask_loss=None)
    megatron(eod_mask_loss=True)
    olmo(tokenizer=str(tokenizer))
    olmo(vocab_size=SIZE + 5)
    (data / "megatron.json").unlink()
    (data / "olmo.json").unlink()
    megatron()
    olmo()


def test_a_vocabulary_larger_than_the_models_is_refused(data: Path) -> None:
    refused(
        "megatron.bin has a vocabulary of 320, more than NullTokenizer's megatron.vocab-size + 1 = 319",
        megatron,
        vocab_size=SIZE - 2,
    )
    refused(
        "megatron.bin has a vocabulary of 320, more than megatron.padded-vocab-size 256",
        megatron,
        tokenizer_type="HuggingFaceTokenizer",
        padded_vocab_size=256,
    )
    # Ids in the embedding's padding would train without a word.
    refused(
        "olmo.npy has a vocabulary of 320, more than olmo.model.vocab_size 319",
        olmo,
        vocab_size=SIZE - 1,
        eos_token_id=5,
        pad_token_id=5,
    )
    for name in ("megatron.json", "olmo.json"):
        (data / name).unlink()
    refused(
        "megatron.bin holds the token 319, which is not below NullTokenizer's megatron.vocab-size + 1 = 319",
        megatron,
        vocab_size=SIZE - 2,
    )
    refused(
        "olmo.npy holds the token 319, which is not below olmo.model.vocab_size 319",
        olmo,
        vocab_size=SIZE - 1,
        eos_token_id=5,
        pad_token_id=5,
    )


def test_another_end_token_is_refused(data: Path) -> None:
    refused(
        "megatron.bin ends documents with 319, not with NullTokenizer's megatron.vocab-size 500",
        megatron,
        vocab_size=500,
        reset_attention_mask=True,
    )
    megatron(vocab_size=500)  # where nothing looks for it, its number does not matter
    refused("olmo.npy ends documents with 319, not with olmo.model.eos_token_id 0", olmo, eos_token_id=0)
    refused("olmo.model.eos_token_id 320 is not below vocab_size 320", olmo, eos_token_id=SIZE)
    refused("olmo.model.pad_token_id 320 is not below vocab_size 320", olmo, pad_token_id=SIZE)


@pytest.mark.parametrize("has_manifest", [True, False])
def test_tokens_of_another_type_are_refused(data: Path, has_manifest: bool) -> None:
    tokens = np.fromfile("olmo.npy", "<u2")
    tokens.astype("<u4").tofile("wide.npy")
    if has_manifest:
        manifest = json.loads((data / "olmo.json").read_text())
        manifest.update(dtype="uint32", files={".npy": 4 * len(tokens)})
        (data / "wide.json").write_text(json.dumps(manifest))
        refused(
            "wide.npy holds tokens of uint32, which would be read as uint16; set memmap_dtype: uint32",
            olmo,
            "wide.npy",
        )
    else:
        refused(
            "wide.npy looks like tokens of 32 bits, which would be read as uint16; set memmap_dtype: uint32",
            olmo,
            "wide.npy",
        )
        (data / "olmo.json").unlink()
    olmo("wide.npy", "uint32")
    refused(
        "olmo.npy holds"
        if has_manifest
        else "olmo.npy has"
        if len(tokens) % 2
        else "olmo.npy holds the token",
        olmo,
        "olmo.npy",
        "uint32",
    )
    refused("memmap_dtype float32 is no integer type of NumPy's", olmo, "olmo.npy", "float32")


def test_files_of_the_wrong_size_are_refused(data: Path) -> None:
    with (data / "olmo.npy").open("ab") as file:
        file.write(b"\0")
    size = (data / "olmo.npy").stat().st_size
    refused(f"olmo.npy has {size} bytes, which are not whole tokens of uint16", olmo)
    with (data / "olmo.npy").open("ab") as file:
        file.write(b"\0")
    refused(f"olmo.npy has {size + 1} bytes, not the {size - 1} that olmo.json names; prepare it again", olmo)
    np.save("header.npy", np.arange(300, dtype="<u2"))
    refused(
        "header.npy has a NumPy header, which would be read as tokens; write it with `tofile`",
        olmo,
        "header.npy",
    )


def test_an_index_that_does_not_fit_its_tokens_is_refused(data: Path) -> None:
    (data / "other.idx").write_bytes((data / "megatron.idx").read_bytes())
    refused("other.bin has ", megatron, "other")
    for content, sentence in (
        (b"", "other.idx is no index of a Megatron data set"),
        (b"\x80\x04" * 30, "other.idx is no index of a Megatron data set"),
        (
            struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 7, 1, 2),
            "other.idx is of version 1 and token type 7, which hold no",
        ),
        (struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 0, 1) + bytes(8), "other.idx holds no documents"),
        ((data / "megatron.idx").read_bytes()[:-3], "other.idx has "),
    ):
        (data / "other.idx").write_bytes(content)
        refused(sentence, megatron, "other")
    write_indexed(data / "negative", np.array([5, -1, 7], "<i4"), 4)
    refused("negative.bin holds the token -1", megatron, "negative")
    write_indexed(data / "wide", np.array([5, 1, 400], "<i4"), 4)
    megatron("wide", vocab_size=400)
    # The same numbers under an index that says 16 bits.
    write_indexed(data / "narrow", np.array([5, 1, 400] * 50, "<i4").view("<u2"), 8)
    refused("narrow.bin looks like tokens of 32 bits, which would be read as uint16", megatron, "narrow")


def test_data_sets_that_a_file_lists_are_checked_too(data: Path) -> None:
    (data / "blend.txt").write_text("0.5 megatron 0.5 gone\n")
    refused(
        "megatron.data-args-path: gone.bin and gone.idx not found", megatron, None, data_args_path="blend.txt"
    )
    splits = {"train": ["1", "megatron"], "valid": "megatron", "test": None}
    (data / "splits.json").write_text(json.dumps(splits))
    megatron(None, per_split_data_args_path="splits.json")
    refused(
        "megatron.bin has a vocabulary", megatron, None, per_split_data_args_path="splits.json", vocab_size=9
    )
    (data / "splits.json").write_text("[")
    refused(
        "megatron.per-split-data-args-path: splits.json cannot be read",
        megatron,
        None,
        per_split_data_args_path="splits.json",
    )


def test_different_tokenizers_are_refused(data: Path, tokenizer: Path) -> None:
    refused(
        "megatron.bin and other.bin were prepared with different tokenizers; prepare one anew",
        megatron,
        ["megatron", "other"],
    )
    model = {"tokenizer_type": "HuggingFaceTokenizer", "vocab_size": None}
    megatron(**model, tokenizer_model=str(tokenizer.parent))
    refused(
        "megatron.bin was prepared with another tokenizer than other.tokenizer.json",
        megatron,
        **model,
        tokenizer_model="other.tokenizer.json",
    )
    refused(
        "olmo.npy was prepared with another tokenizer than other.tokenizer.json",
        olmo,
        tokenizer="other.tokenizer.json",
    )
    (data / "other.json").unlink()  # then nobody says what made it
    megatron(["megatron", "other"])


def test_a_sample_is_spread_over_a_large_file(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "SAMPLE_BYTES", 1 << 20)
    tokens = np.random.default_rng(1).integers(0, SIZE, 4 << 20).astype("<u2")
    for place in (0, len(tokens) - 10, len(tokens) // 2):
        spoiled = tokens.copy()
        spoiled[place : place + (1 << 19)] = SIZE
        spoiled.tofile("large.npy")
        refused("large.npy holds the token 320", olmo, "large.npy")
    tokens.tofile("large.npy")
    read = sum(piece.nbytes for piece in token_files._pieces(data / "large.npy", np.dtype("<u2"), 1 << 20))
    assert read == 1 << 20
    olmo("large.npy")


def test_the_check_needs_no_library_of_the_data_room() -> None:
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('tokenizers', 'pyarrow', 'tqdm', 'zstandard')));"
        "import polycom_ext.integrations.megatron.adapter, polycom_ext.integrations.olmo.adapter"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
