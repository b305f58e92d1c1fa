"""What OLMo will take the token files of a spec for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polycom_ext.data.token_files import Model
from polycom_ext.integrations.olmo import token_format

FIELDS = ("vocab_size", "eos_token_id", "pad_token_id")
"""Of OLMo's ModelConfig, what is said of tokens."""


def problem(section: str, files: Mapping[str, str], model: Mapping[str, Any], tokenizer: Any) -> str:
    """Why local token files are not what the model will take them for, as a sentence; empty if they are.

    Args:
        section: of the spec, as it is named there.
        files: local ones -> the `memmap_dtype` of their section.
        model: its `model` section, over upstream's defaults.
        tokenizer: the identifier of the tokenizer that OLMo loads.
    """
    given = {name: model.get(name) for name in FIELDS}
    ids = {name: value if isinstance(value, int) else None for name, value in given.items()}
    vocab_size = ids["vocab_size"]
    for name in ("eos_token_id", "pad_token_id"):
        id_ = ids[name]
        if id_ is not None and vocab_size is not None and id_ >= vocab_size:
            return f"{section}.model.{name} {id_} is not below vocab_size {vocab_size}"
    return token_format.problem(
        files,
        "memmap_dtype",
        Model(
            vocab_size,
            f"{section}.model.vocab_size",
            ids["eos_token_id"],
            f"{section}.model.eos_token_id",
            Path(tokenizer) if isinstance(tokenizer, str) else None,
        ),
    )
