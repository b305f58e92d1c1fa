"""Megatron's names and those of the exchange format, side by side.

Names are those of torch_dist, but for the number of the block; in `torch` a few differ (legacy.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from polycom_ext.activations import parse
from polycom_ext.checkpoints.model import Concatenated, GroupedQKV, Row


@dataclass(frozen=True)
class Sharded(Row):
    """One that ranks of tensor parallelism share."""

    dim: int = 0
    """Of theirs, or of an expert's; of a layer of several parts, of each."""


QKV = GroupedQKV()
ATTENTION = (
    Row("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",)),
    Row("self_attention.linear_qkv.layer_norm_bias", ("input_layernorm.bias",)),
    Sharded(
        "self_attention.linear_qkv.weight", tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), QKV, dim=0
    ),
    Sharded("self_attention.linear_qkv.bias", tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), QKV, dim=0),
    Row("self_attention.q_layernorm.weight", ("self_attn.q_proj.norm.weight",)),
    Row("self_attention.k_layernorm.weight", ("self_attn.k_proj.norm.weight",)),
    Sharded("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), dim=1),
    Row("self_attention.linear_proj.bias", ("self_attn.o_proj.bias",)),
    Row("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",)),
    Row("mlp.linear_fc1.layer_norm_bias", ("post_attention_layernorm.bias",)),
)
"""Of a block's names; a norm is a part of the layer after it."""
ALONE = (
    Row("input_layernorm.weight", ("input_layernorm.weight",)),
    Row("input_layernorm.bias", ("input_layernorm.bias",)),
)
BEFORE_EXPERTS = (
    Row("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
    Row("pre_mlp_layernorm.bias", ("post_attention_layernorm.bias",)),
)
"""Norms that are layers of their own. Before experts Transformer Engine has one; for the local layers it is a
part of what follows."""
DENSE = (
    Sharded("mlp.linear_fc1.weight", ("mlp.up_proj.weight",), dim=0),
    Sharded("mlp.linear_fc1.bias", ("mlp.up_proj.bias",), dim=0),
    Sharded("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), dim=1),
    Row("mlp.linear_fc2.bias", ("mlp.down_proj.bias",)),
)
ROUTER = (Row("mlp.router.weight", ("mlp.gate.weight",)),)
EXPERTS = (
    Sharded("mlp.experts.experts.linear_fc1.weight", ("mlp.experts.up_proj",), dim=0),
    Sharded("mlp.experts.experts.linear_fc2.weight", ("mlp.experts.down_proj",), dim=1),
)
"""Each a piece an expert."""
AROUND = (
    Sharded("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), dim=0),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Row("decoder.final_layernorm.bias", ("model.norm.bias",)),
    Sharded("output_layer.weight", ("lm_head.weight",), dim=0),
)
BLOCKS = "decoder.layers."
ACTIVATION = {
    False: ("mlp.activation_func.", "mlp.act_fn."),
    True: ("mlp.experts.experts.activation_func.", "mlp.experts.act_fn."),
}
"""Whether there are experts -> where the coefficients stand."""
WITHOUT_STATE = ("embedding.word_embeddings", "output_layer", "mlp.router")
"""Layers with a weight of which no extra state is asked for; the coefficients' neither."""


def block_rows(config: Mapping[str, Any], written: bool = False) -> Iterator[Row]:
    """Those that a block may have; or, of several for the same, those that are written."""
    experts, gated = bool(config["num_experts"]), config["activation"]["gated"]
    yield from ATTENTION
    if not written:
        yield from ALONE
    if experts or not written:
        yield from BEFORE_EXPERTS
    for row in (*ROUTER, *EXPERTS) if experts else DENSE:
        if gated and "up_proj" in row.ours[0]:
            gate = row.ours[0].replace("up_proj", "gate_proj")
            halves = Concatenated(-1 if row.theirs.endswith("bias") else -2)
            row = replace(row, ours=(gate, *row.ours), layout=halves)
        yield row
    theirs, ours = ACTIVATION[experts]
    entry, _ = parse(config["activation"]["name"])
    if entry.learnable:
        for name in entry.load()(**{}).state_dict():
            yield Row(theirs + name, (ours + name,))
