"""The constants that fix a model's function: each stands in its configuration, and has no default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from polycom_ext.activations import parse
from polycom_ext.errors import PolycomError

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((*SIZES, "num_experts", "num_experts_per_tok"), (int,)),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "norm_topk_prob"), (bool,)),
    "norm_after": (bool,),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), (int, float)),
    **{"activation": (dict,), "norm": (dict,)},
    **{"qk_norm": (str, type(None)), "clip_qkv": (int, float, type(None))},
}
"""Key of a configuration -> what it may be; PolyComConfig of integrations/huggingface has what they mean."""
NORMS, QK_NORMS = ("rms", "layer"), (None, "row", "head")
OF_A_NORM = {"kind": (str,), "affine": (bool,), "bias": (bool,)}


def described(activation: str) -> dict[str, Any]:
    """NAME or NAME-ORDER as a configuration describes it, with the constants that a new one has.

    Raises PolycomError as `activations.parse`.
    """
    entry, order = parse(activation)
    target = entry.load()
    constants = {name: getattr(target, name) for name in getattr(target, "constants", ())}
    ordered = {"order": order} if entry.ordered else {}
    return {"name": entry.name, "gated": entry.gated, **ordered, **constants}


def complete(config: Mapping[str, Any], source: str) -> None:
    """Raise PolycomError where a configuration lacks a constant, or says one that makes no sense."""

    def check(of: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], within: str = "") -> None:
        for name, kind in kinds.items():
            if name not in of:
                raise PolycomError(f"{source} does not say {within}{name}, for which no default is safe")
            if not isinstance(of[name], kind) or (isinstance(of[name], bool) and bool not in kind):
                raise PolycomError(f"{source} says {within}{name} {of[name]!r}, which makes no sense")

    check(config, KINDS)
    check(config["norm"], OF_A_NORM, "norm.")
    activation = config["activation"]
    check(activation, {"name": (str,), "gated": (bool,)}, "activation.")
    expected = described(activation["name"])
    check(activation, {name: (type(value), int) for name, value in expected.items()}, "activation.")
    few = [name for name in SIZES if config[name] < 1]
    experts, active = config["num_experts"], config["num_experts_per_tok"]
    constants = {f"activation.{name}": value for name, value in activation.items()}
    endless = {
        name: value
        for name, value in {**config, **constants}.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    clip = config["clip_qkv"]
    for name, value, sound in (
        *((name, config[name], False) for name in few),
        *((name, value, False) for name, value in endless.items()),
        ("rms_norm_eps", config["rms_norm_eps"], config["rms_norm_eps"] >= 0),
        ("rope_theta", config["rope_theta"], config["rope_theta"] > 0),
        ("norm.kind", config["norm"]["kind"], config["norm"]["kind"] in NORMS),
        ("qk_norm", config["qk_norm"], config["qk_norm"] in QK_NORMS),
        ("clip_qkv", clip, clip is None or clip > 0),
        ("num_key_value_heads", config["num_key_value_heads"], _divides(config)),
        ("num_experts_per_tok", active, 0 <= active <= experts and bool(active) is bool(experts)),
        ("activation.name", activation["name"], activation["name"] == expected["name"]),
        ("activation.gated", activation["gated"], activation["gated"] is expected["gated"]),
        ("activation.order", activation.get("order"), activation.get("order", 1) >= 1),
    ):
        if not sound:
            raise PolycomError(f"{source} says {name} {value!r}, which makes no sense")


def _divides(config: Mapping[str, Any]) -> bool:
    groups: int = config["num_key_value_heads"]
    return groups > 0 and int(config["num_attention_heads"]) % groups == 0
