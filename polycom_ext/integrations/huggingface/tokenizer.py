"""The tokenizer that goes with a model, as transformers loads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"


class Tokenizer:
    """A tokenizer.json, for a model of that vocabulary.

    Raises PolycomError where it is none, and where it gives tokens that the model does not have.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        from polycom_ext.data.tokenizer import vocabulary  # needs tokenizers, which others can do without

        self.path = path
        self._words = vocabulary(path, vocab_size)

    @property
    def eos_id(self) -> int | None:
        """Of the token that ends a document; None where it has none of the known names, or several."""
        from polycom_ext.data.tokenizer import KNOWN_EOS

        found = [self._words[word] for word in KNOWN_EOS if word in self._words]
        return found[0] if len(found) == 1 else None

    def write(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Beside a model of that config.json."""
        shutil.copyfile(self.path, folder / FILE)
        named = {number: word for word, number in self._words.items()}
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config["max_position_embeddings"],
        }
        for token in ("bos", "eos", "pad"):
            if config.get(f"{token}_token_id") in named:
                settings[f"{token}_token"] = named[config[f"{token}_token_id"]]
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
