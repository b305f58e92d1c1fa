"""Small models of every kind that the configuration can describe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polycom_ext import activations
from polycom_ext.checkpoints.constants import described
from polycom_ext.integrations import huggingface

pytest.importorskip("transformers")
huggingface.register()

PLAIN: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
    **{"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    **{"rms_norm_eps": 1e-5, "rope_theta": 5000.0, "bos_token_id": None, "eos_token_id": None},
    "activation": {"name": "polynorm", "gated": False, "order": 3, "eps": 1e-6},
    "norm": {"kind": "rms", "affine": True, "bias": False},
    **{"norm_after": False, "qk_norm": None, "clip_qkv": None},
    **{"num_experts": 0, "num_experts_per_tok": 0, "norm_topk_prob": False},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "olmo": {"norm": {"kind": "layer", "affine": False, "bias": False}, "clip_qkv": 0.05},
    "olmo2": {"norm_after": True, "qk_norm": "row"},
    "olmoe": {**EXPERTS, "qk_norm": "row"},
    "normalised-router": {**EXPERTS, "norm_topk_prob": True, "qk_norm": "head"},
    "gated-experts": {**EXPERTS, "activation": {"name": "swiglu", "gated": True}},
}
"""What differs from PLAIN."""


for _name in activations.REGISTRY:
    KINDS[_name] = {"activation": described(_name)}


def made(kind: str, **more: Any) -> Any:
    """A model with random weights, and coefficients that are not those of the start.

    Args:
        kind: of KINDS.
        more: what differs from that.
    """
    from transformers import AutoModelForCausalLM

    from polycom_ext.integrations.huggingface.configuration_polycom import PolyComConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PolyComConfig(**{**PLAIN, **KINDS[kind], **more})).eval()
    for name, parameter in model.named_parameters():
        if "act_fn" in name:
            torch.nn.init.uniform_(parameter, 0.1, 0.6)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that what the FFN does shows in the logits
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, PLAIN["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(1))
