"""The configuration of a PolyCom language model, for transformers 4.57 and 5.

This file and its two companions are saved beside a model's weights, and need only torch and transformers
there. Every constant that fixes the function stands in config.json, and one that is missing is an error: a
default that fits most models makes this one quietly worse.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")
OURS = (
    *("activation", "norm", "norm_after", "qk_norm", "clip_qkv"),
    *("num_experts", "num_experts_per_tok", "norm_topk_prob"),
)
REQUIRED = (*SIZES, *SWITCHES, "rms_norm_eps", *OURS)
NORMS = ("rms", "layer")
QK_NORMS = (None, "row", "head")
_TAKES_ROPE_PARAMETERS = "rope_theta" not in inspect.signature(LlamaConfig.__init__).parameters


class PolyComConfig(LlamaConfig):
    """A Llama-like model with any activation in an FFN without a gate, or with one, dense or of experts.

    Beside Llama's own keys, in which `intermediate_size` is the FFN's width (of an expert, where there are
    some), `rms_norm_eps` the eps of every normalisation of the model's, and `rope_theta` (or
    `rope_parameters`) is asked for:

        activation           {"name": NAME, "gated": bool, and its constants ("order", "eps", "beta")}
        norm                 {"kind": "rms" | "layer", "affine": bool, "bias": bool} of the blocks
        norm_after           whether the blocks' stand behind attention and FFN (OLMo 2), not before
        qk_norm              of queries and keys: null, "row" (all heads together, OLMoE) or "head" (Megatron)
        clip_qkv             bound of what the projections to queries, keys and values give, or null
        num_experts          0 for a dense model
        num_experts_per_tok  experts that a token goes to, 0 for a dense model
        norm_topk_prob       whether their probabilities are made to sum to 1

    Raises ValueError, in a sentence, for a key that is missing or a value that is none of these.
    """

    model_type = "polycom"
    has_no_defaults_at_init = True
    # An FFN whose rows are sharded would normalise each shard by itself: only attention is sharded.
    base_model_tp_plan = {  # noqa: RUF012 as transformers declares it
        **{f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
        "layers.*.self_attn.o_proj": "rowwise",
    }

    def __init__(self, **given: Any) -> None:
        missing = [key for key in REQUIRED if key not in given]
        if not (given.get("rope_theta") or (given.get("rope_parameters") or {}).get("rope_theta")):
            missing.append("rope_theta")
        if missing:
            raise ValueError(
                f"the configuration of a PolyCom model has no {', '.join(missing)}: no default is safe"
            )
        if not _TAKES_ROPE_PARAMETERS and "rope_parameters" in given:
            rope = dict(given.pop("rope_parameters"))
            given.setdefault("rope_theta", rope.pop("rope_theta"))
            if rope.get("rope_type", "default") != "default":
                given.setdefault("rope_scaling", rope)
        ours = {key: given.pop(key) for key in OURS}
        _check(ours)
        super().__init__(**{**given, "hidden_act": ours["activation"]["name"]})
        for key, value in ours.items():
            setattr(self, key, value)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: whatever transformers' defaults are, all that the constructor asks for."""
        asked: dict[str, Any] = {key: getattr(self, key) for key in REQUIRED}
        return {**super().to_diff_dict(), **asked}


def _check(ours: dict[str, Any]) -> None:
    activation, norm = ours["activation"], ours["norm"]
    if not (isinstance(activation, dict) and {"name", "gated"} <= activation.keys()):
        raise ValueError(f"activation must say `name` and `gated`, not {activation!r}")
    if not (isinstance(norm, dict) and {"kind", "affine", "bias"} <= norm.keys() and norm["kind"] in NORMS):
        raise ValueError(f"norm must say `kind` (one of {NORMS}), `affine` and `bias`, not {norm!r}")
    if not isinstance(ours["norm_after"], bool):
        raise ValueError(f"norm_after must be true or false, not {ours['norm_after']!r}")
    if ours["qk_norm"] not in QK_NORMS:
        raise ValueError(f"qk_norm must be one of {QK_NORMS}, not {ours['qk_norm']!r}")
    experts, active = ours["num_experts"], ours["num_experts_per_tok"]
    if not (0 <= active <= experts and bool(active) is bool(experts)):
        raise ValueError(f"{active} of {experts} experts cannot be active")
