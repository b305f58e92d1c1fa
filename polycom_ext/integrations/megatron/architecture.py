"""What a model is: as Megatron's saved arguments say it, and as the exchange format does."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from polycom_ext.activations import parse
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron.checkpoint import Function, constants, trained_function
from polycom_ext.integrations.megatron.native import FLAGS

PLAIN: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "use_rope_scaling": (False,),
    "no_rope_freq": (None,),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "attention_output_gate": (False,),
    "qk_l2_norm": (False,),
    "softmax_type": ("vanilla",),
    "window_size": (None,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "mtp_num_layers": (None, 0),
    "is_hybrid_model": (False,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "openai_gelu": (False,),
    "quick_geglu": (False,),
    "moe_layer_freq": (1,),
    "moe_shared_expert_intermediate_size": (None, 0),
    "moe_latent_size": (None, 0),
    "moe_router_score_function": ("softmax",),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_topk_scaling_factor": (None,),
    "moe_router_num_groups": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_expert_capacity_factor": (None,),
}
"""Argument -> what it may be: for any other value there is no such model in the exchange format."""

NORMS = {("rms", True, False): "RMSNorm", ("layer", True, True): "LayerNorm"}
"""(kind, has weights, has biases) -> `normalization`."""


def configuration(args: Any, vocabulary: int, source: str) -> dict[str, Any]:
    """Of a model with so many embeddings. Raises PolycomError for what the exchange format cannot express."""
    try:
        return _configuration(args, vocabulary, source)
    except AttributeError as error:
        raise PolycomError(
            f"the arguments in {source} do not say {error.name}, so not what the model is"
        ) from None


def _configuration(args: Any, vocabulary: int, source: str) -> dict[str, Any]:
    for name, allowed in PLAIN.items():
        value = getattr(args, name, allowed[0])
        if value not in allowed:
            raise PolycomError(f"{source} was trained with {name} {value}, which the exchange format lacks")
    if args.add_qkv_bias and not args.add_bias_linear:
        raise PolycomError(f"{source} was trained with add_qkv_bias alone, which the exchange format lacks")
    if args.add_bias_linear and args.num_experts:
        raise PolycomError(f"{source} has experts with biases, which the exchange format lacks")
    function = trained_function(args)
    if function.name == "gelu" and args.add_bias_linear and args.bias_gelu_fusion:
        raise PolycomError(
            f"{source} was trained with bias_gelu_fusion, whose GELU is the tanh approximation, which the "
            "exchange format lacks"
        )
    experts = args.num_experts or 0
    padded = getattr(args, "padded_vocab_size", None)
    if padded not in (None, vocabulary):
        raise PolycomError(
            f"{source} has {vocabulary} embeddings, and its arguments say padded_vocab_size {padded}"
        )
    return {
        "vocab_size": vocabulary,
        "hidden_size": args.hidden_size,
        "intermediate_size": (args.moe_ffn_hidden_size if experts else None) or args.ffn_hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": args.num_query_groups
        if args.group_query_attention
        else args.num_attention_heads,
        "head_dim": args.kv_channels,
        "max_position_embeddings": args.max_position_embeddings,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "attention_bias": args.add_bias_linear,
        "mlp_bias": args.add_bias_linear,
        "rms_norm_eps": args.layernorm_epsilon,
        "rope_theta": float(args.rotary_base),
        "initializer_range": args.init_method_std,
        "activation": {
            "name": function.name,
            "gated": parse(function.name)[0].gated,
            **function.constants,
        },
        "norm": {
            "kind": {"RMSNorm": "rms", "LayerNorm": "layer"}[args.normalization],
            "affine": True,
            "bias": args.normalization == "LayerNorm",
        },
        "norm_after": False,
        "qk_norm": "head" if args.qk_layernorm else None,
        "clip_qkv": None,
        "num_experts": experts,
        "num_experts_per_tok": args.moe_router_topk if experts else 0,
        "norm_topk_prob": bool(experts) and not args.moe_router_pre_softmax,
    }


def arguments(config: Mapping[str, Any]) -> Namespace:
    """Those by which Megatron knows such a model, and which `--use-checkpoint-args` takes over.

    Raises PolycomError for what Megatron cannot express.
    """
    for lacking in _lacking(config):
        raise PolycomError(f"Megatron has no {lacking}: --to hf keeps such a model")
    width, experts = config["intermediate_size"], config["num_experts"]
    plain = {name: allowed[0] for name, allowed in PLAIN.items()}
    same = {
        name: config[key]
        for name, key in (
            *(("padded_vocab_size", "vocab_size"), ("hidden_size", "hidden_size")),
            *(("num_layers", "num_hidden_layers"), ("num_attention_heads", "num_attention_heads")),
            *(("num_query_groups", "num_key_value_heads"), ("kv_channels", "head_dim")),
            *(("max_position_embeddings", "max_position_embeddings"), ("add_bias_linear", "mlp_bias")),
            *(("seq_length", "max_position_embeddings"), ("rotary_base", "rope_theta")),
            *(("layernorm_epsilon", "rms_norm_eps"), ("init_method_std", "initializer_range")),
        )
        if key in config
    }
    return Namespace(
        **plain,
        **same,
        ffn_hidden_size=width,
        moe_ffn_hidden_size=width if experts else None,
        group_query_attention=config["num_key_value_heads"] != config["num_attention_heads"],
        untie_embeddings_and_output_weights=not config["tie_word_embeddings"],
        add_qkv_bias=False,
        add_position_embedding=True,
        normalization=NORMS[_norm(config)],
        qk_layernorm=config["qk_norm"] is not None,
        num_experts=experts or None,
        moe_router_topk=config["num_experts_per_tok"] or 2,
        moe_router_pre_softmax=bool(experts) and not config["norm_topk_prob"],
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_gelu_fusion=False,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        **_activation(config["activation"]),
    )


def _activation(activation: Mapping[str, Any]) -> dict[str, Any]:
    own = {flag.replace("-", "_"): False for flags in FLAGS.values() for flag in flags}
    name = activation["name"]
    if name in FLAGS:
        return {**own, **{flag.replace("-", "_"): value for flag, value in FLAGS[name].items()}}
    return {**own, "polycom_activation": named(activation), "polycom_constants": _constants(activation)}


def named(activation: Mapping[str, Any]) -> str:
    """NAME or NAME-ORDER."""
    name, order = activation["name"], activation.get("order")
    return name if order is None or parse(name)[1] == order else f"{name}-{order}"


def _constants(activation: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in activation.items() if key not in ("name", "gated")}


def _norm(config: Mapping[str, Any]) -> tuple[str, bool, bool]:
    norm = config["norm"]
    return norm["kind"], norm["affine"], norm["bias"]


def _lacking(config: Mapping[str, Any]) -> Iterator[str]:
    """What Megatron lacks of such a model."""
    activation, experts = config["activation"], config["num_experts"]
    name = activation["name"]
    ours = Function(name, _constants(activation))
    theirs = Function(name, {} if name in FLAGS else constants(named(activation)))
    if activation["gated"] and name not in FLAGS:
        yield f"gated {name}"
    if ours != theirs:
        yield f"{ours}, but {theirs}"
    if _norm(config) not in NORMS:
        kind, affine, bias = _norm(config)
        having = {True: "with", False: "without"}
        yield f"{kind} norm {having[affine]} weights and {having[bias]} biases"
    if config["norm_after"]:
        yield "norms behind attention and FFN (norm_after)"
    if config["qk_norm"] == "row":
        yield "norm of queries and keys over all heads"
    if config["qk_norm"] and config["norm"]["bias"]:
        yield "LayerNorm of queries and keys without biases"
    if config["clip_qkv"] is not None:
        yield "clipping of queries, keys and values (clip_qkv)"
    if config["attention_bias"] != config["mlp_bias"]:
        yield "biases in attention or in the FFN alone"
    if experts and config["mlp_bias"]:
        yield "biases of experts that the exchange format holds"
    if experts and config["norm_topk_prob"] and config["num_experts_per_tok"] == 1:
        yield "router that gives its only expert the weight 1"
