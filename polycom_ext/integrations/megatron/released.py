"""The checkpoints of the authors' dense models, which their Megatron-LM of 2023 has saved, read without it.

One file holds the model under names that Megatron-LM has given up since, and the arguments. It is known from
the authors' code (`dense_model/megatron_patch/model/llama2`), in which an activation stands at
`mlp.activation_func` of a block. Their runs had one tensor-parallel and one pipeline-parallel rank.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from polycom_ext.checkpoints import inert
from polycom_ext.checkpoints.archive import Archive
from polycom_ext.checkpoints.constants import described
from polycom_ext.checkpoints.forms import Found
from polycom_ext.checkpoints.model import Concatenated, GroupedQKV, Model, Row
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron import saved

FILES = ("mp_rank_00/model_optim_rng.pt", "mp_rank_00/model_rng.pt")
"""The second beside a distributed optimizer."""
ROOT = "language_model."
BLOCKS = "encoder.layers."
QKV = tuple(f"self_attn.{x}_proj.weight" for x in "qkv")
AROUND = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Row("encoder.final_norm.weight", ("model.norm.weight",)),
    Row("output_layer.weight", ("lm_head.weight",)),
)
BLOCK = (
    Row("input_norm.weight", ("input_layernorm.weight",)),
    Row("self_attention.query_key_value.weight", QKV, GroupedQKV()),
    Row("self_attention.dense.weight", ("self_attn.o_proj.weight",)),
    Row("post_attention_norm.weight", ("post_attention_layernorm.weight",)),
    Row("mlp.dense_h_to_4h.weight", ("mlp.up_proj.weight",)),
    Row("mlp.dense_4h_to_h.weight", ("mlp.down_proj.weight",)),
    Row("mlp.activation_func.weight", ("mlp.act_fn.weight",)),
    Row("mlp.activation_func.bias", ("mlp.act_fn.bias",)),
)
GATED = Row("mlp.dense_h_to_4h.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), Concatenated(-2))
FLAGS = {"swiglu": "swiglu", "squared_relu": "relu2", "polynorm": "polynorm", "polyrelu": "polyrelu"}
"""Argument -> our activation; the constants are those of the authors' code. Without one it is GELU."""
PLAIN: dict[str, Any] = {
    **{"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "num_experts": None},
    **{"normalization": "RMSNorm", "position_embedding_type": "rope", "rotary_percent": 1.0},
    **{"add_bias_linear": False, "apply_layernorm_1p": False, "openai_gelu": False},
    **{"rotary_scale_factor": 1, "rotary_seq_len_interpolation_factor": None},
}
"""Argument -> what it has to be."""


class Checkpoints:
    """Reads them."""

    def find(self, path: Path) -> Found | None:
        folder = saved.tracked(path) or path
        for file in (folder / name for name in FILES):
            with contextlib.suppress(
                PolycomError
            ):  # what is damaged may be a newer Megatron's, which can tell
                if file.is_file() and ROOT[:-1] in _model(inert.load(file), file):
                    return Found(folder)
        return None

    def read(self, path: Path) -> Model:
        archive = Archive(next(path / name for name in FILES if (path / name).is_file()))
        args = archive.content.get("args")
        if args is None:
            raise PolycomError(f"{archive.path} holds no arguments, so nothing says what the model is")
        held = dict(_flat(_model(archive.content, archive.path)))
        try:
            config = _config(args, held, archive)
        except AttributeError as error:
            raise PolycomError(f"{archive.path} does not say {error.name}: no default is safe") from None
        rows = {row.theirs: row for row in _rows(config)}
        readers: dict[str, Callable[[], Any]] = {}
        for name, said in held.items():
            if name.endswith("_extra_state") or "rotary_emb" in name:
                continue
            if name not in rows:
                raise PolycomError(f"{archive.path} holds {name}, for which the exchange format has no place")
            readers.update(rows[name].read(_reader(archive, name, said), config))
        return Model(config, readers, str(path))


CHECKPOINTS = Checkpoints()


def _model(content: Any, path: Path) -> Mapping[str, Any]:
    model = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping):
        raise PolycomError(f"{path} holds no model")
    return model


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted names; what was made by a call is a leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and not isinstance(value, inert.Named):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _reader(archive: Archive, name: str, said: Any) -> Callable[[], Any]:
    def read() -> Any:
        tensor = archive.tensor(said)
        return tensor.float() if ".activation_func." in name and tensor.itemsize < 4 else tensor

    return read


def _rows(config: Mapping[str, Any]) -> Iterator[Row]:
    for row in AROUND:
        yield Row(ROOT + row.theirs, row.ours, row.layout)
    gated = config["activation"]["gated"]
    for layer in range(config["num_hidden_layers"]):
        for row in BLOCK:
            row = GATED if gated and row.theirs == GATED.theirs else row
            ours = tuple(f"model.layers.{layer}.{name}" for name in row.ours)
            yield Row(f"{ROOT}{BLOCKS}{layer}.{row.theirs}", ours, row.layout)


def _config(args: Any, held: Mapping[str, Any], archive: Archive) -> dict[str, Any]:
    for name, wanted in PLAIN.items():
        value = getattr(args, name, wanted)
        if value != wanted:
            raise PolycomError(f"{archive.path} was saved with {name} {value}: only {wanted} can be read")
    activation = described(next((ours for flag, ours in FLAGS.items() if getattr(args, flag, False)), "gelu"))
    embedding = held.get(f"{ROOT}embedding.word_embeddings.weight")
    if embedding is None:
        raise PolycomError(f"{archive.path} holds no word embeddings")
    coefficients = next((name for name in held if re.search(r"\.activation_func\.weight$", name)), None)
    if "order" in activation and coefficients is not None:
        activation["order"] = archive.tensor(held[coefficients]).numel()
    heads = args.num_attention_heads
    return {
        "vocab_size": archive.tensor(embedding).shape[0],
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": args.num_query_groups if args.group_query_attention else heads,
        "head_dim": args.kv_channels,
        "max_position_embeddings": args.max_position_embeddings,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": args.norm_epsilon,
        "rope_theta": float(args.rotary_base),
        "initializer_range": args.init_method_std,
        "activation": activation,
        "norm": {"kind": "rms", "affine": True, "bias": False},
        **{"norm_after": False, "qk_norm": None, "clip_qkv": None},
        **{"num_experts": 0, "num_experts_per_tok": 0, "norm_topk_prob": False},
    }
