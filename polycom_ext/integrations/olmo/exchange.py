"""OLMo's ModelConfig as the configuration in which models are exchanged, and back.

Each refusal is one sentence that names what the other form has no place for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polycom_ext.checkpoints.constants import described
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.olmo.native import NATIVE

PLAIN: dict[str, tuple[Any, ...]] = {
    "rope": (True,),
    "alibi": (False,),
    "embedding_layer_norm": (False,),
    "scale_logits": (False,),
}
"""Field of `model` -> what it may be: for any other value there is no such model in the exchange format."""
PLAIN_EXPERTS: dict[str, tuple[Any, ...]] = {
    "moe_dropless": (True, None),
    "moe_shared_expert": (False, None),
    "include_bias": (False,),
}
"""Likewise in a model of experts."""
LATER: dict[str, Any] = {
    **{"alibi": False, "embedding_layer_norm": False, "scale_logits": False, "norm_after": False},
    **{"n_kv_heads": None, "multi_query_attention": None, "clip_qkv": None, "mlp_hidden_size": None},
    **{"rope_theta": 10_000, "layer_norm_eps": 1e-5, "attention_layer_norm": False, "init_std": 0.02},
    **{"attention_layer_norm_with_affine": True, "bias_for_layer_norm": None},
    **{"moe_dropless": None, "moe_shared_expert": None, "eos_token_id": None, "pad_token_id": None},
}
"""Fields that some versions of OLMo do not save -> what a model without them is."""
BLOCKS = ("sequential", "llama", "moe")
KINDS = {"default": "layer", "low_precision": "layer", "rms": "rms"}
"""layer_norm_type -> the kind of norm."""


def read(saved: Any, source: str) -> dict[str, Any]:
    """`model` of a config.yaml -> the configuration of a Model. Raises PolycomError for what that lacks."""
    model = _Section(saved, source)
    experts = model["block_type"] == "moe"
    kind, affine = KINDS.get(model["layer_norm_type"]), model["layer_norm_with_affine"]
    bias, normalizes = model["include_bias"], model["attention_layer_norm"]
    norm_bias = bias if model["bias_for_layer_norm"] is None else model["bias_for_layer_norm"]
    by_rms = kind == "rms" and model["attention_layer_norm_with_affine"] and not norm_bias
    lacking = {
        f"{name} {model[name]}": model[name] not in allowed
        for name, allowed in {**PLAIN, **(PLAIN_EXPERTS if experts else {})}.items()
    }
    lacking |= {
        f"blocks of the type {model['block_type']}": model["block_type"] not in BLOCKS,
        f"norms of the type {model['layer_norm_type']}": kind is None,
        "an output layer with a bias": bias and not model["weight_tying"],
        "RMS norms with a bias": kind == "rms" and affine and norm_bias,
        "queries and keys normalised otherwise than by rms with weights": normalizes and not by_rms,
        "queries and keys that are clipped before they are normalised": normalizes and model["clip_qkv"],
    }
    _refuse(lacking, source, "the exchange format")
    activation = described(model["activation_type"])
    width = model["mlp_hidden_size"] or model["mlp_ratio"] * model["d_model"]
    heads = model["n_heads"]
    size = model["embedding_size"] or model["vocab_size"]
    return {
        "vocab_size": size,
        "hidden_size": model["d_model"],
        "intermediate_size": width // 2 if activation["gated"] else width,
        "num_hidden_layers": model["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": model["n_kv_heads"] or (1 if model["multi_query_attention"] else heads),
        "head_dim": model["d_model"] // heads,
        "max_position_embeddings": model["max_sequence_length"],
        "tie_word_embeddings": model["weight_tying"],
        "attention_bias": bias,
        "mlp_bias": bias,
        "rms_norm_eps": model["layer_norm_eps"],
        "rope_theta": float(model["rope_theta"]),
        "initializer_range": model["init_std"],
        "eos_token_id": _token(model["eos_token_id"], size),
        "pad_token_id": _token(model["pad_token_id"], size),
        "activation": activation,
        "norm": {"kind": kind, "affine": affine, "bias": bool(affine and norm_bias)},
        "norm_after": False if model["block_type"] == "llama" else model["norm_after"],  # those do not ask
        "qk_norm": "row" if normalizes else None,
        "clip_qkv": model["clip_qkv"],
        "num_experts": model["moe_num_experts"] if experts else 0,
        "num_experts_per_tok": model["moe_top_k"] if experts else 0,
        "norm_topk_prob": False,
    }


class _Section:
    """`model` of a config.yaml; a field that is missing is an error, unless versions differ in having it."""

    def __init__(self, saved: Any, source: str) -> None:
        if not isinstance(saved, dict):
            raise PolycomError(f"the config.yaml of {source} has no section `model`")
        self._saved, self._source = {**LATER, **saved}, source

    def __getitem__(self, name: str) -> Any:
        if name not in self._saved:
            raise PolycomError(f"the config.yaml of {self._source} does not say model.{name}")
        return self._saved[name]


def _token(number: Any, size: int) -> int | None:
    return number if isinstance(number, int) and 0 <= number < size else None


def written(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The configuration of a Model -> `model` of a config.yaml. Raises PolycomError for what OLMo lacks."""
    _check(config, source)
    activation, experts, norm = config["activation"], config["num_experts"], config["norm"]
    width = config["intermediate_size"]
    end = config.get("eos_token_id")
    end = config["vocab_size"] - 1 if end is None else end  # OLMo wants one, and trains without reading it
    told = {
        "d_model": config["hidden_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "multi_query_attention": None,
        "clip_qkv": config["clip_qkv"],
        "n_layers": config["num_hidden_layers"],
        "mlp_hidden_size": 2 * width if activation["gated"] else width,
        "activation_type": _named(activation),
        "block_type": "moe" if experts else "sequential",
        "alibi": False,
        "rope": True,
        "rope_theta": int(config["rope_theta"]),
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "attention_layer_norm": config["qk_norm"] == "row",
        "attention_layer_norm_with_affine": True,
        "embedding_layer_norm": False,
        "layer_norm_type": {"layer": "default", "rms": "rms"}[norm["kind"]],
        "layer_norm_with_affine": norm["affine"],
        "layer_norm_eps": config["rms_norm_eps"],
        "bias_for_layer_norm": norm["bias"],
        "include_bias": config["attention_bias"],
        "norm_after": config["norm_after"],
        "scale_logits": False,
        "max_sequence_length": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "embedding_size": config["vocab_size"],
        "weight_tying": config["tie_word_embeddings"],
        "eos_token_id": end,
        "pad_token_id": end if config.get("pad_token_id") is None else config["pad_token_id"],
        "init_device": "cpu",
        "init_std": config.get("initializer_range", 0.02),
    }
    if experts:  # an OLMo without patches knows no such fields
        told |= {"moe_num_experts": experts, "moe_top_k": config["num_experts_per_tok"]}
        told |= {"moe_dropless": True, "moe_shared_expert": False}
    return told


def _named(activation: Mapping[str, Any]) -> str:
    name: str = activation["name"]
    return f"{name}-{activation['order']}" if "order" in activation else name


def _check(config: Mapping[str, Any], source: str) -> None:
    activation, norm, experts = config["activation"], config["norm"], config["num_experts"]
    name = _named(activation)
    lacking = {
        f"heads of {config['head_dim']} numbers, which are not hidden_size / num_attention_heads": config[
            "head_dim"
        ]
        * config["num_attention_heads"]
        != config["hidden_size"],
        "queries and keys that are normalised head by head": config["qk_norm"] == "head",
        "layer norms around queries and keys normalised by rms": (config["qk_norm"], norm["kind"])
        == ("row", "layer"),
        "queries and keys that are clipped after they are normalised": None
        not in (config["qk_norm"], config["clip_qkv"]),
        "biases in the attention or the FFN alone": config["attention_bias"] != config["mlp_bias"],
        "biases without one in the output layer, whose weights are its own": config["attention_bias"]
        and not config["tie_word_embeddings"],
        "biases in a model of experts": config["attention_bias"] and experts,
        f"rope_theta {config['rope_theta']}, which is no whole number": config["rope_theta"]
        != int(config["rope_theta"]),
        "probabilities of a token's experts made to sum to 1 (norm_topk_prob)": config["norm_topk_prob"],
        f"experts that are gated by {name}": experts and activation["gated"] and name not in NATIVE,
        f"{name} with constants {dict(activation)}, which are not polycom_ext's": dict(activation)
        != described(name),
    }
    _refuse(lacking, source, "OLMo")


def _refuse(lacking: Mapping[str, Any], source: str, where: str) -> None:
    for what, there in lacking.items():
        if there:
            raise PolycomError(f"{source} has {what}, for which {where} has no place")
