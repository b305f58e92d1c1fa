"""What classes of transformers' own compute: a model of theirs is written for them, and read from them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GATED = {"swiglu": "silu"}
UNGATED = {name: name for name in ("gelu", "relu", "relu2", "silu", "mish")}
"""Our activations -> `hidden_act`."""
RMS = {"kind": "rms", "affine": True, "bias": False}
BARE = {"kind": "layer", "affine": False, "bias": False}
"""The norm of OLMo's dense models, whose eps is not to be chosen."""
BEFORE = {"norm_after": False}
QK_NORM = (r"self_attn\.([qk])_proj\.norm\.", r"self_attn.\1_norm.")
"""Pattern of our name -> its name."""
SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "attention_bias"),
    *("rope_theta", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Keys that mean the same in each of transformers' classes."""


@dataclass(frozen=True)
class Stock:
    """A class of transformers that computes some of our models."""

    model_type: str
    architecture: str
    needs: Mapping[str, Any]
    """What our configuration must say."""
    keeps: tuple[str, ...]
    """Keys besides SHARED that it takes as they are."""
    renames: tuple[tuple[str, str], ...] = ()
    """Pattern of our name -> its name; a stack of experts is taken apart at `{expert}`."""
    calls: Mapping[str, str] = field(default_factory=dict)
    """Our key -> its key, where that is another."""
    says: Mapping[str, Any] = field(default_factory=dict)
    """What it says besides."""
    activations: Mapping[str, str] = field(default_factory=lambda: GATED)
    """Ours that it computes -> its `hidden_act`."""


_EXPERTS = r"mlp\.experts\.(gate|up|down)_proj$"
STOCK = (
    Stock(
        *("llama", "LlamaForCausalLM"),
        needs={**BEFORE, "norm": RMS, "qk_norm": None, "clip_qkv": None, "num_experts": 0},
        keeps=("head_dim", "mlp_bias", "rms_norm_eps"),
    ),
    Stock(
        *("arcee", "ArceeForCausalLM"),
        needs={**BEFORE, "norm": RMS, "qk_norm": None, "clip_qkv": None, "num_experts": 0},
        keeps=("head_dim", "mlp_bias", "rms_norm_eps"),
        activations=UNGATED,
    ),
    Stock(
        *("olmo", "OlmoForCausalLM"),
        needs={
            **{**BEFORE, "norm": BARE, "rms_norm_eps": 1e-5, "qk_norm": None},
            **{"num_experts": 0, "mlp_bias": False},
        },
        keeps=("clip_qkv",),
    ),
    Stock(
        *("olmo2", "Olmo2ForCausalLM"),
        needs={
            **{"norm_after": True, "norm": RMS, "qk_norm": "row", "clip_qkv": None},
            **{"num_experts": 0, "mlp_bias": False},
        },
        keeps=("rms_norm_eps",),
        renames=(QK_NORM,),
    ),
    Stock(
        *("olmoe", "OlmoeForCausalLM"),
        needs={**BEFORE, "norm": RMS, "qk_norm": "row", "mlp_bias": False},
        keeps=("rms_norm_eps", "clip_qkv", "num_experts", "num_experts_per_tok", "norm_topk_prob"),
        renames=(
            QK_NORM,
            (_EXPERTS, r"mlp.experts.{expert}.\1_proj.weight"),
        ),
    ),
    Stock(
        *("mixtral", "MixtralForCausalLM"),
        needs={
            **{**BEFORE, "norm": RMS, "qk_norm": None, "clip_qkv": None, "norm_topk_prob": True},
            **{"attention_bias": False, "mlp_bias": False},
        },
        keeps=("head_dim", "rms_norm_eps", "num_experts", "num_experts_per_tok"),
        calls={"num_experts": "num_local_experts"},
        says={"sliding_window": None},
        renames=(
            (r"mlp\.gate\.weight$", "block_sparse_moe.gate.weight"),
            (r"mlp\.experts\.gate_proj$", "block_sparse_moe.experts.{expert}.w1.weight"),
            (r"mlp\.experts\.up_proj$", "block_sparse_moe.experts.{expert}.w3.weight"),
            (r"mlp\.experts\.down_proj$", "block_sparse_moe.experts.{expert}.w2.weight"),
        ),
    ),
)


def stock(config: Mapping[str, Any]) -> Stock | None:
    """The class of transformers that computes this model, if there is one."""
    divided = config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    for one in STOCK:
        fits = all(config[key] == value for key, value in one.needs.items())
        if fits and config["activation"]["name"] in one.activations and (divided or "head_dim" in one.keeps):
            return one
    return None


def theirs(own: Stock | None, name: str) -> str:
    """Our name of a tensor -> its name in a folder; of one expert's where `{expert}` stands in it."""
    for pattern, by in own.renames if own else ():
        name = re.sub(pattern, by, name)
    return name
