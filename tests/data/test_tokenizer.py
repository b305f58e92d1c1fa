"""The tokenizer that is trained here, and what is done to one that is given."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from polycom_ext.data import formats
from polycom_ext.data.tokenizer import EOS, Encoder, train
from polycom_ext.errors import PolycomError

from .conftest import read_documents, write_jsonl

Prepare = Callable[..., tuple[int, str]]


def test_training_is_deterministic_whatever_the_threads(texts: list[str]) -> None:
    script = (
        "import json, sys, hashlib; from polycom_ext.data.tokenizer import train;"
        "print(hashlib.sha256(train(json.load(sys.stdin), 330)).hexdigest())"
    )

    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "1"}
    other = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert other.stdout.strip() == hashlib.sha256(train(texts, 330)).hexdigest()


def test_trained_tokenizer_keeps_every_text(texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(train(texts, 330))
    encoder, tokenizer = Encoder(path), Tokenizer.from_file(str(path))
    assert (encoder.vocab_size, encoder.eos, encoder.eos_id) == (330, EOS, 329)
    for text in [*texts, "never seen: ß∂ƒ \x00 \t\r\n", " leading and trailing "]:
        ids = encoder(text)
        assert ids[-1] == encoder.eos_id
        assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == text


def test_text_too_small_gives_a_smaller_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(train(["abab"], 400))
    encoder = Encoder(path)
    assert 257 < encoder.vocab_size < 262
    assert encoder.eos_id == encoder.vocab_size - 1


def test_a_document_cannot_end_another(tokenizer: Path) -> None:
    encoder = Encoder(tokenizer)
    ids = encoder(f"before {EOS} after")
    assert ids.count(encoder.eos_id) == 1
    assert ids[-1] == encoder.eos_id
    assert Tokenizer.from_file(str(tokenizer)).encode(f"before {EOS} after").ids.count(encoder.eos_id) == 1, (
        "the plain library does take it for the end, so the test above tests something"
    )


def given(path: Path, tokens: list[str]) -> Tokenizer:
    vocabulary = {"a": 0, "b": 1, "?": 2, **{token: 3 + index for index, token in enumerate(tokens)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return tokenizer


def test_given_tokenizer_adds_cuts_and_pads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = given(path, ["</s>", "<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 4), ("</s>", 3)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8, pad_id=2)
    tokenizer.save(str(path))
    assert tokenizer.encode("a b a b a b").ids == [4, 0, 1, 3, 2, 2, 2, 2]
    assert Encoder(path)("a b a b a b") == [0, 1, 0, 1, 0, 1, 3]
    assert Encoder(path)(" ") == []


def test_end_token_is_found_or_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    given(path, ["</s>"])
    assert Encoder(path).eos_id == 3
    assert Encoder(path, eos="b").eos_id == 1
    with pytest.raises(PolycomError, match="has no <end>; name its token"):
        Encoder(path, eos="<end>")
    given(path, ["x"])
    with pytest.raises(PolycomError, match="has no <|endoftext|> or </s> or".replace("|", r"\|")):
        Encoder(path)
    given(path, ["</s>", EOS])
    with pytest.raises(PolycomError, match="and </s>; name its token that ends a document with --eos"):
        Encoder(path)


def test_document_on_which_the_tokenizer_fails_is_a_bad_document(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.Unigram([("</s>", 0.0), ("a", -1.0), ("b", -2.0)], None)).save(str(path))
    source = write_jsonl(tmp_path / "a.jsonl", ["ab", "ac", "ba"])
    for workers in (1, 2):
        arguments = (source, "--output", tmp_path / str(workers), "--tokenizer", path, "--workers", workers)
        status, printed = prepare(*arguments)
        assert status == 2
        assert f"{source}:2: the tokenizer cannot encode it (Encountered an unknown token" in printed
        assert "Traceback" not in printed
        assert prepare(*arguments, "--on-bad-line", "skip")[0] == 0
        assert read_documents(tmp_path / str(workers)) == [[1, 2, 0], [2, 1, 0]]


def test_tokenizer_that_cannot_be_used_gets_one_sentence(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    source = write_jsonl(tmp_path / "a.jsonl", ["ab"])
    for vocabulary, format_, said in (
        ({}, "megatron", "has an empty vocabulary"),
        ({"a": 0, "b": 1, "</s>": 2**31}, "megatron", "does not fit into the 32-bit tokens"),
        ({"a": 0, "b": 1, "</s>": 2**16}, "olmo", "does not fit into the 16-bit tokens"),
        (None, "megatron", "is not a tokenizer.json"),  # the library panics
        ({"a": 0, "</s>": 1}, "megatron", "leaves merges out by chance"),
        ({"a": 0, "b": 1}, "megatron", "name its token that ends a document with --eos"),
    ):
        model: dict[str, Any] = {"type": "BPE", "vocab": vocabulary, "merges": [], "dropout": None}
        if "chance" in said:
            model["dropout"] = 0.1
        if vocabulary is None:
            model.update(vocab={"a": 0, "b": 1, "ab": 2}, merges=[["a", "b"]], continuing_subword_prefix="##")
        path.write_text(json.dumps({"model": model}))
        arguments = (source, "--output", tmp_path / "out", "--tokenizer", path, "--format", format_)
        status, printed = prepare(*arguments)
        assert (status, said in printed) == (2, True), printed
        assert not list(tmp_path.glob("out*"))
    with pytest.raises(PolycomError, match="has no caf"):
        Encoder(path, "caf\udce9")  # as an argument that is not UTF-8 arrives


def test_token_types_hold_the_vocabulary() -> None:
    megatron, olmo = formats.find("megatron"), formats.find("olmo")
    assert megatron.dtype(65499) == "<u2"
    assert megatron.dtype(65500) == "<i4"
    assert olmo.dtype(65536) == "<u2"
    with pytest.raises(PolycomError, match="65537 does not fit into the 16-bit tokens"):
        olmo.dtype(65537)
