"""Megatron's `torch_dist` checkpoints as models apart from Megatron, read without it.

Such a checkpoint holds whole tensors, whatever the layout of the run that saved it (tensor, pipeline, expert,
data parallel, distributed optimizer); the blocks of a model are stacked along the first dimension where they
are alike, and stand one by one where they are not. What the model is, its saved arguments say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from polycom_ext.activations import parse
from polycom_ext.checkpoints import inert
from polycom_ext.checkpoints.forms import Found
from polycom_ext.checkpoints.model import Concatenated, GroupedQKV, Model, Row
from polycom_ext.checkpoints.sharded import METADATA, Folder
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron.checkpoint import trained_function
from polycom_ext.integrations.megatron.saved import TRACKER
from polycom_ext.runs import tokenizer
from polycom_ext.runs.checkpoints import Damaged, problem_of_distributed
from polycom_ext.runs.record import Record

QKV = GroupedQKV()
ATTENTION = (
    Row("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",)),
    Row("self_attention.linear_qkv.layer_norm_bias", ("input_layernorm.bias",)),
    Row("input_layernorm.weight", ("input_layernorm.weight",)),
    Row("input_layernorm.bias", ("input_layernorm.bias",)),
    Row("self_attention.linear_qkv.weight", tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), QKV),
    Row("self_attention.linear_qkv.bias", tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), QKV),
    Row("self_attention.q_layernorm.weight", ("self_attn.q_proj.norm.weight",)),
    Row("self_attention.k_layernorm.weight", ("self_attn.k_proj.norm.weight",)),
    Row("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
    Row("self_attention.linear_proj.bias", ("self_attn.o_proj.bias",)),
    Row("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",)),
    Row("mlp.linear_fc1.layer_norm_bias", ("post_attention_layernorm.bias",)),
    Row("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
    Row("pre_mlp_layernorm.bias", ("post_attention_layernorm.bias",)),
)
"""Of a block's names; each norm has two, as it is a layer of its own or a part of the next."""
DENSE = (
    Row("mlp.linear_fc1.weight", ("mlp.up_proj.weight",)),
    Row("mlp.linear_fc1.bias", ("mlp.up_proj.bias",)),
    Row("mlp.linear_fc2.weight", ("mlp.down_proj.weight",)),
    Row("mlp.linear_fc2.bias", ("mlp.down_proj.bias",)),
)
EXPERTS = (
    Row("mlp.router.weight", ("mlp.gate.weight",)),
    Row("mlp.experts.experts.linear_fc1.weight", ("mlp.experts.up_proj",)),
    Row("mlp.experts.experts.linear_fc2.weight", ("mlp.experts.down_proj",)),
)
AROUND = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Row("decoder.final_layernorm.bias", ("model.norm.bias",)),
    Row("output_layer.weight", ("lm_head.weight",)),
)
BLOCKS = "decoder.layers."
ACTIVATION = {
    False: ("mlp.activation_func.", "mlp.act_fn."),
    True: ("mlp.experts.experts.activation_func.", "mlp.experts.act_fn."),
}
"""Whether there are experts -> where the coefficients stand."""

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


class Checkpoints:
    """Reads them."""

    def find(self, path: Path) -> Found | None:
        for folder in (path, Record(path).checkpoints):
            latest = folder / TRACKER
            if latest.is_file() and latest.read_text().strip().isdigit():
                folder = folder / f"iter_{int(latest.read_text()):07d}"
            if (folder / "common.pt").is_file() and (folder / METADATA).is_file():
                return Found(folder)
        return None

    def read(self, path: Path) -> Model:
        problem = problem_of_distributed(path)
        if problem is not None:
            raise PolycomError(f"{Damaged(path, problem)}: name another checkpoint")
        folder = Folder(path)
        args = inert.load(path / "common.pt").get("args")
        if args is None:
            raise PolycomError(f"{path / 'common.pt'} holds no arguments, so nothing says what the model is")
        config = _config(args, folder, path)
        readers: dict[str, Callable[[], Any]] = {}
        for row, reader in _rows(folder, config):
            readers.update(row.read(reader, config))
        if config["tie_word_embeddings"]:
            readers.pop("lm_head.weight", None)
        return tokenizer.added(Model(config, readers, str(path)), path)


CHECKPOINTS = Checkpoints()


def _rows(folder: Folder, config: dict[str, Any]) -> Iterator[tuple[Row, Callable[[], Any]]]:
    """Each row that the checkpoint has a tensor for, by whole names, with how to read that tensor."""
    around = {row.theirs: row for row in AROUND}
    inside = {row.theirs: row for row in _block_rows(config)}
    for name, stored in folder.tensors.items():
        if name in around:
            yield around[name], _reader(folder, name, ())
        match = re.fullmatch(rf"{re.escape(BLOCKS)}(?:(\d+)\.)?(.+)", name)
        row = inside.get(match[2]) if match else None
        if match is None or row is None:
            if name.startswith(("optimizer.", "chained_")) or name in around:
                continue
            raise PolycomError(f"{folder.path} holds {name}, for which the exchange format has no place")
        layers = range(stored.shape[0]) if match[1] is None else [int(match[1])]
        for layer in layers:
            whole = Row(name, tuple(f"model.layers.{layer}.{ours}" for ours in row.ours), row.layout)
            yield whole, _reader(folder, name, (layer,) if match[1] is None else ())


def _reader(folder: Folder, name: str, index: tuple[int, ...]) -> Callable[[], Any]:
    return lambda: folder.read(name, index)


def _block_rows(config: dict[str, Any]) -> Iterator[Row]:
    yield from ATTENTION
    experts, gated = bool(config["num_experts"]), config["activation"]["gated"]
    for row in EXPERTS if experts else DENSE:
        if gated and "up_proj" in row.ours[0]:
            gate = row.ours[0].replace("up_proj", "gate_proj")
            row = Row(row.theirs, (gate, *row.ours), Concatenated(-1 if row.theirs.endswith("bias") else -2))
        yield row
    theirs, ours = ACTIVATION[experts]
    entry, _ = parse(config["activation"]["name"])
    if entry.learnable:
        for name in entry.load()(**{}).state_dict():
            yield Row(theirs + name, (ours + name,))


def _config(args: Any, folder: Folder, path: Path) -> dict[str, Any]:
    for name, allowed in PLAIN.items():
        value = getattr(args, name, allowed[0])
        if value not in allowed:
            raise PolycomError(f"{path} was trained with {name} {value}, which the exchange format lacks")
    if args.add_qkv_bias and not args.add_bias_linear:
        raise PolycomError(f"{path} was trained with add_qkv_bias alone, which the exchange format lacks")
    if args.add_bias_linear and args.num_experts:
        raise PolycomError(f"{path} has experts with biases, which the exchange format lacks")
    function = trained_function(args)
    if function.name == "gelu" and args.add_bias_linear and args.bias_gelu_fusion:
        raise PolycomError(
            f"{path} was trained with bias_gelu_fusion, whose GELU is the tanh approximation, which the "
            "exchange format lacks"
        )
    experts = args.num_experts or 0
    embedding = folder.tensors["embedding.word_embeddings.weight"]
    return {
        "vocab_size": embedding.shape[0],
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
        "qk_norm": "head" if args.qk_layernorm else None,
        "clip_qkv": None,
        "num_experts": experts,
        "num_experts_per_tok": args.moe_router_topk if experts else 0,
        "norm_topk_prob": bool(experts) and not args.moe_router_pre_softmax,
    }
