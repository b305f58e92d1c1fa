"""No document can end another one: the end token stands once, last, whatever the tokenizer and the text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from polycom_ext.data.sources import BadDocument
from polycom_ext.data.tokenizer import EOS, Encoder, train

from .conftest import SENTENCE, read_documents, write_jsonl

END = "</s>"
CHARACTERS = [*"</s>ab", "é", " "]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(added: AddedToken) -> Tokenizer:
    """Of GPT-2's kind; its vocabulary ends with `<|endoftext|>`."""
    tokenizer = Tokenizer.from_str(train([SENTENCE, "</s> </s>"] * 3, 320).decode())
    tokenizer.add_tokens([added])
    return tokenizer


def byte_level_with_piece() -> Tokenizer:
    """Of Llama 3's kind: what is a piece needs no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(ids([END, *alphabet]), [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def t5(unknown: int | None = 2) -> Tokenizer:
    """A Unigram model with the end token as a piece and as an added token."""
    pieces = ["<pad>", END, "<unk>", "▁", "a", "▁b", "</", "b", "s"]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -float(index)) for index, piece in enumerate(pieces)], unknown)
    )
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(pieces[:3])
    return tokenizer


def llama() -> Tokenizer:
    """A BPE with byte fallback whose merges lead to the end token."""
    pieces = ["<unk>", "<s>", END, *BYTES, "▁", "<", "/", "s", ">", "a", "</", "</s", f"{END}a"]
    merges = [("<", "/"), ("</", "s"), ("</s", ">"), (END, "a")]
    tokenizer = Tokenizer(
        models.BPE(ids(pieces), merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", END])
    return tokenizer


def words(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def word_piece() -> Tokenizer:
    pieces = [END, "?", *CHARACTERS, *(f"##{character}" for character in CHARACTERS)]
    tokenizer = words(models.WordPiece(ids(pieces), unk_token="?"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def ids(pieces: list[str]) -> dict[str, int]:
    return {piece: index for index, piece in enumerate(pieces)}


LOSSLESS: dict[str, Callable[[], Tokenizer]] = {
    "special token": lambda: byte_level(AddedToken(END, special=True)),
    "token": lambda: byte_level(AddedToken(END, special=False)),
    "token that strips": lambda: byte_level(AddedToken(END, special=False, lstrip=True, rstrip=True)),
    "token, normalized": lambda: byte_level(AddedToken(END, special=False, normalized=True)),
    "llama": llama,
}
LOSSY: dict[str, Callable[[], Tokenizer]] = {
    "byte-level with piece": byte_level_with_piece,
    "t5": t5,
    "t5 without unk": lambda: t5(None),
    "word piece": word_piece,
    "word level": lambda: words(models.WordLevel(ids([END, "?", "a", "b"]), unk_token="?")),
    "word level without unk": lambda: words(models.WordLevel(ids([END, "a", "b"]), unk_token="?")),
    "unk is the end token": lambda: words(models.WordLevel(ids([END, "a", "b"]), unk_token=END)),
    "bpe without unk": lambda: Tokenizer(models.BPE(ids([END, *CHARACTERS]), [], ignore_merges=True)),
}

TEXTS = st.lists(
    st.sampled_from(
        [END, EOS, "<", "/s>", "</", "s", ">", "a", "b", " ", "\n", "é", "🌊", "＜/ｓ＞", "▁", "<pad>"]
    )
    | st.text(max_size=3),
    max_size=9,
).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    for name, make in {**LOSSLESS, **LOSSY}.items():
        make().save(str(folder / name))
    return folder


def plain(path: Path) -> Tokenizer:
    """The library's own, told as far as it can be that a text is nothing but a text."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def test_end_token_stands_once_and_last_and_no_text_is_lost(folder: Path) -> None:
    zoo = {name: (Encoder(folder / name, END), plain(folder / name)) for name in [*LOSSLESS, *LOSSY]}

    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        for name, (encoder, tokenizer) in zoo.items():
            try:
                ids = encoder(text)
            except BadDocument:
                assert name in LOSSY
                continue
            assert not ids or (ids.count(encoder.eos_id), ids[-1]) == (1, encoder.eos_id), name
            expected = tokenizer.encode(text, add_special_tokens=False).ids
            if encoder.eos_id not in expected:
                assert ids[:-1] == expected, name
            elif name in LOSSLESS:
                decoded = [tokenizer.decode(some, skip_special_tokens=False) for some in (ids[:-1], expected)]
                if "strips" in name:
                    decoded = ["".join(text.split()) for text in decoded]
                assert decoded[0] == decoded[1], name

    check()


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("token", "a </s> b", ["a", "Ġ</", "s", ">", "Ġ", "b"]),
        ("t5", "a </s> b", ["▁", "a", "▁", "</", "s", "<unk>", "▁b"]),
        ("t5", "＜/ｓ＞", ["▁", "</", "s", "<unk>"]),
        ("llama", "a</s>", ["▁", "a", "</s", ">"]),
        ("word piece", "a </s> b", ["a", "<", "##/", "##s", "##>", "b"]),
        ("word level", "a </s> b", ["a", "?", "b"]),
        ("byte-level with piece", "a </s> b", ["a", "<", "/", "s", ">", "b"]),
        ("bpe without unk", "</s>", ["<", "/", "s", ">"]),
    ],
)
def test_spelt_end_token_is_written_with_the_other_pieces(
    folder: Path, name: str, text: str, pieces: list[str]
) -> None:
    encoder, tokenizer = Encoder(folder / name, END), plain(folder / name)
    assert encoder.eos_id in tokenizer.encode(text, add_special_tokens=False).ids
    assert [tokenizer.id_to_token(id_) for id_ in encoder(text)] == [*pieces, END]


def test_tokenizer_files_of_the_old_kind_are_rewritten_too(folder: Path, tmp_path: Path) -> None:
    definition = json.loads((folder / "llama").read_text())
    definition["model"]["merges"] = [" ".join(merge) for merge in definition["model"]["merges"]]
    (tmp_path / "old").write_text(json.dumps(definition))
    assert Encoder(tmp_path / "old", END)("a</s>b") == Encoder(folder / "llama", END)("a</s>b")


@pytest.mark.parametrize(
    ("name", "eos", "text"),
    [
        ("bpe without unk", "a", "ba "),  # it would leave the letter out
        ("word level without unk", END, "a </s> b"),
        ("unk is the end token", END, "a c b"),
    ],
)
def test_text_that_only_the_end_token_can_write_is_a_bad_document(
    folder: Path, tmp_path: Path, prepare: Callable[..., tuple[int, str]], name: str, eos: str, text: str
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["b", text, "b"])
    arguments = (source, "--output", tmp_path / "out", "--tokenizer", folder / name, "--eos", eos)
    status, printed = prepare(*arguments)
    assert status == 2
    assert f"{source}:2: it holds text that this tokenizer writes as its end token, {eos}, and" in printed
    assert prepare(*arguments, "--on-bad-line", "skip")[0] == 0
    assert (tmp_path / "out.skipped.txt").read_text().startswith(f"{source}:2: it holds text")
    assert len(read_documents(tmp_path / "out")) == 2
