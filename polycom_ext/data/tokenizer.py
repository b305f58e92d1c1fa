"""Tokenizers of the Hugging Face `tokenizers` library: one from a file, or a byte-level BPE trained here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from polycom_ext.errors import PolycomError

EOS = "<|endoftext|>"
KNOWN_EOS = (EOS, "</s>", "<eos>", "<|end_of_text|>")
SMALLEST_VOCABULARY = 257
"""256 bytes and the end of a document."""


class Encoder:
    """Text -> token ids, ending with the id that ends a document.

    Nothing is added to a text but that: no beginning-of-text token, no padding, no truncation. A special
    token that a text spells out is taken for the characters that it is, so that a document cannot end
    another one.

    Args:
        path: a `tokenizer.json`.
        eos: the token that ends a document; None takes the one of `KNOWN_EOS` that the tokenizer has.

    Raises:
        PolycomError: no such file, not a tokenizer, no such token, or several to choose from.
    """

    def __init__(self, path: Path, eos: str | None = None) -> None:
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
            self._tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # `tokenizers` raises nothing more special
            raise PolycomError(
                f"{path} is not a tokenizer.json of Hugging Face tokenizers ({error})"
            ) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eos, self.eos_id = _choose_eos(self._tokenizer, path, eos)

    def __call__(self, text: str) -> list[int]:
        """The ids of `text` and then `eos_id`; of a text without a token, nothing."""
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return [*ids, self.eos_id] if ids else []


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-level BPE (the pre-tokenizer of GPT-2) and return its `tokenizer.json`.

    The same texts give the same bytes. The last id is `<|endoftext|>`, as in GPT-2, so that Megatron's
    `NullTokenizer` with `--vocab-size` one less than the vocabulary ends documents with the same id. A text
    too small for `vocab_size` merges gives a smaller vocabulary.

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


def _choose_eos(tokenizer: Tokenizer, path: Path, eos: str | None) -> tuple[str, int]:
    candidates = KNOWN_EOS if eos is None else (eos,)
    found = [(token, id_) for token in candidates if (id_ := tokenizer.token_to_id(token)) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        reason = f"has {' and '.join(token for token, _ in found)}"
    else:
        reason = f"has no {' or '.join(candidates)}"
    raise PolycomError(f"{path} {reason}; name its token that ends a document with --eos")
