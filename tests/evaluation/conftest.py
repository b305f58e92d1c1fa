"""A small model in a folder of Hugging Face, with a tokenizer, and the data of OLMo's wheel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polycom_ext import upstream
from polycom_ext.checkpoints.constants import described
from polycom_ext.data import tokenizer
from polycom_ext.integrations import huggingface
from polycom_ext.upstream import fetch, pins

pytest.importorskip("lm_eval")
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from polycom_ext.integrations.huggingface.configuration_polycom import PolyComConfig

from .token_files import COUNT, LENGTH

huggingface.register()
SIZES: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64},
    **{"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    **{"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": None, "eos_token_id": 511},
    "activation": described("polynorm"),
    "norm": {"kind": "rms", "affine": True, "bias": False},
    **{"norm_after": False, "qk_norm": None, "clip_qkv": None},
    **{"num_experts": 0, "num_experts_per_tok": 0, "norm_topk_prob": False},
}


def saved(folder: Path) -> Path:
    """A model with random weights."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(PolyComConfig(**SIZES)).save_pretrained(folder)
    texts = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    (folder / "tokenizer.json").write_bytes(tokenizer.train(texts, 512))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The tree of OLMo's wheel."""
    fetch.fetch(pins.get("olmo"))
    return upstream.tree("olmo")


@pytest.fixture(scope="session")
def ids() -> Any:
    """Windows, and some tokens that belong to none."""
    return np.random.default_rng(5).integers(0, 512, LENGTH * COUNT + 7)
