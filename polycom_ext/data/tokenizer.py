"""Tokenizers of the Hugging Face `tokenizers` library: one from a file, or a byte-level BPE trained here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from polycom_ext.data.sources import BadDocument
from polycom_ext.errors import PolycomError

EOS = "<|endoftext|>"
KNOWN_EOS = (EOS, "</s>", "<eos>", "<|end_of_text|>")
REMEMBERED = 1 << 18
"""Words, where the library itself keeps the first 10,000."""
SMALLEST_VOCABULARY = 257
"""256 bytes and the end of a document."""


class Encoder:
    """Text -> token ids, ending with the id that ends a document.

    Nothing is added to a text but that: no beginning-of-text token, no padding, no truncation. The end token
    stands at the end and nowhere else, whatever the text and the tokenizer: a text that spells it out is
    written with the tokenizer's other pieces. Other special tokens that a text spells out are taken for the
    characters that they are too, save those that the tokenizer's model has as pieces of its own.

    Args:
        path: a `tokenizer.json`.
        eos: the token that ends a document; None takes the one of `KNOWN_EOS` that the tokenizer has.

    Raises:
        PolycomError: no such file, not a tokenizer, an empty or a random one, no such token, or several to
            choose from.
    """

    def __init__(self, path: Path, eos: str | None = None) -> None:
        content, self._tokenizer = _opened(path)
        words = self._tokenizer.get_vocab(with_added_tokens=True)
        if not words:
            raise PolycomError(
                f"{path} has an empty vocabulary; give a trained one, or train one: --train-tokenizer SIZE"
            )
        if getattr(self._tokenizer.model, "dropout", None):
            raise PolycomError(
                f"{path} leaves merges out by chance, so that no two runs agree; set dropout in it to null"
            )
        _only_the_text(self._tokenizer)
        # A tenth of the time. It has no public name (tokenizers 0.22).
        remember = getattr(self._tokenizer.model, "_resize_cache", None)
        if remember is not None:
            remember(REMEMBERED)
        self._definition = content
        self._other_pieces: Tokenizer | None = None
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size: int = max(words.values()) + 1
        self.eos, self.eos_id = _choose_eos(words, path, eos)

    def __call__(self, text: str) -> list[int]:
        """The ids of `text` and then `eos_id`; of a text without a token, nothing.

        Raises:
            BadDocument: the tokenizer fails on the text, or can write a part of it as its end token only.
        """
        try:
            ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except BaseException as error:
            if not _is_the_librarys(error):
                raise
            reason = str(error).partition("\n")[0]
            raise BadDocument(f"the tokenizer cannot encode it ({reason})") from None
        if self.eos_id in ids:
            ids = self._around_eos(text)
        return [*ids, self.eos_id] if ids else []

    def _around_eos(self, text: str) -> list[int]:
        """The ids of a text that spells the end token, in the tokenizer's other pieces."""
        if self._other_pieces is None:
            self._other_pieces = _without(self._definition, self.eos)
        try:
            spelt = self._tokenizer.encode(text, add_special_tokens=False)
            written = self._other_pieces.encode(text, add_special_tokens=False)
        except Exception:  # an unknown piece, and no token for such
            written = None
        if written is None or self.eos_id in written.ids or self._loses(text, spelt, written):
            raise BadDocument(
                f"it holds text that this tokenizer writes as its end token, {self.eos}, and cannot write "
                "otherwise"
            )
        ids: list[int] = written.ids
        return ids

    def _loses(self, text: str, spelt: Encoding, written: Encoding) -> bool:
        """Whether a character of `text` that has a part in `spelt` has none in `written`.

        A model without a token for the unknown leaves out what it has no piece for. Blanks that an end token
        takes along from its sides are no loss.
        """
        missing = bytearray(len(text))
        for id_, (start, end) in zip(spelt.ids, spelt.offsets, strict=True):
            if id_ == self.eos_id and (core := text[start:end].strip()):
                start = text.index(core, start)
                end = start + len(core)
            missing[start:end] = b"\1" * (end - start)
        for start, end in written.offsets:
            missing[start:end] = bytes(end - start)
        return any(missing)


def vocabulary(path: Path, size: int) -> dict[str, int]:
    """Token -> id of a `tokenizer.json`, those added to it included, for a model with so many.

    Raises PolycomError as `Encoder`, and where it gives tokens that the model does not have.
    """
    _, tokenizer = _opened(path)
    words: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    greatest = max(words.values(), default=0)
    if greatest >= size:
        raise PolycomError(
            f"{path} gives the token {greatest}, and the vocabulary of the model is {size}: "
            "name its own with --tokenizer"
        )
    return words


def _opened(path: Path) -> tuple[bytes, Tokenizer]:
    """What is in the file, and the tokenizer that it defines."""
    if path.is_dir():
        raise PolycomError(
            f"{path} is a directory; name the tokenizer file, for example {path}/tokenizer.json"
        )
    if not path.is_file():
        raise PolycomError(
            f"no tokenizer file {path}; give a tokenizer.json, or train one: --train-tokenizer SIZE"
        )
    content = path.read_bytes()
    try:
        return content, Tokenizer.from_buffer(content)
    except BaseException as error:
        if not _is_the_librarys(error):
            raise
        raise PolycomError(f"{path} is not a tokenizer.json of Hugging Face tokenizers ({error})") from None


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-level BPE (the pre-tokenizer of GPT-2) and return its `tokenizer.json`.

    The same texts give the same bytes. The last id is `<|endoftext|>`, as in GPT-2, which trainers take for
    granted that load no tokenizer. A text too small for `vocab_size` merges gives a smaller vocabulary.

    Raises:
        PolycomError: as `check_vocabulary`.
    """
    check_vocabulary(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    content: bytes = tokenizer.to_str(pretty=True).encode()
    return content


def check_vocabulary(vocab_size: int) -> None:
    """Refuse a vocabulary that cannot hold every byte.

    Raises:
        PolycomError: `vocab_size` is below `SMALLEST_VOCABULARY`.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise PolycomError(
            f"a vocabulary of {vocab_size} is too small; 256 bytes and {EOS} take {SMALLEST_VOCABULARY}"
        )


def _is_the_librarys(error: BaseException) -> bool:
    """`tokenizers` raises plain exceptions, and Rust's panics, which are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _only_the_text(tokenizer: Tokenizer) -> None:
    """Let it neither add to a text, nor cut it, nor take it for a special token."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True


def _without(content: bytes, token: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, with the same ids, in which no text gives `token`.

    The piece gets a name that does not occur in texts, and the merges go that lead to it.
    """
    hidden = f"\uffff{hashlib.sha256(token.encode()).hexdigest()}"
    definition = json.loads(content)
    for added in definition.get("added_tokens") or ():
        if added["content"] == token:
            added["content"] = hidden
    model = definition["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [[hidden if piece == token else piece, score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {hidden if piece == token else piece: id_ for piece, id_ in model["vocab"].items()}
    if model.get("unk_token") == token:
        model["unk_token"] = hidden
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if token not in (left, right, left + right.removeprefix(prefix))
        ]
    other = Tokenizer.from_str(json.dumps(definition))
    _only_the_text(other)
    return other


def _choose_eos(vocabulary: dict[str, int], path: Path, eos: str | None) -> tuple[str, int]:
    candidates = KNOWN_EOS if eos is None else (eos,)
    found = [(token, vocabulary[token]) for token in candidates if token in vocabulary]
    if len(found) == 1:
        return found[0]
    if found:
        reason = f"has {' and '.join(token for token, _ in found)}"
    else:
        reason = f"has no {' or '.join(candidates)}"
    raise PolycomError(f"{path} {reason}; name its token that ends a document with --eos")
