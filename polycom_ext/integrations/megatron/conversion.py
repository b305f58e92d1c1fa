"""Megatron's `torch_dist` checkpoints as models apart from Megatron, read and written without it.

Such a checkpoint holds whole tensors, whatever the layout of the run that saved it (tensor, pipeline, expert,
data parallel, distributed optimizer); the blocks of a model are stacked along the first dimension where they
are alike, and stand one by one where they are not. What the model is, its saved arguments say.
"""

from __future__ import annotations

import json
import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from polycom_ext.activations import parse
from polycom_ext.checkpoints import inert
from polycom_ext.checkpoints.forms import Found, Options
from polycom_ext.checkpoints.model import Concatenated, GroupedQKV, Model, Row
from polycom_ext.checkpoints.sharded import Folder, Writer
from polycom_ext.errors import PolycomError
from polycom_ext.files import write_text
from polycom_ext.integrations.megatron import architecture, saved
from polycom_ext.integrations.megatron.saved import RELEASE, TRACKER
from polycom_ext.runs import tokenizer
from polycom_ext.runs.checkpoints import Damaged
from polycom_ext.runs.record import Record

QKV = GroupedQKV()
ATTENTION = (
    Row("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",)),
    Row("self_attention.linear_qkv.layer_norm_bias", ("input_layernorm.bias",)),
    Row("self_attention.linear_qkv.weight", tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), QKV),
    Row("self_attention.linear_qkv.bias", tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), QKV),
    Row("self_attention.q_layernorm.weight", ("self_attn.q_proj.norm.weight",)),
    Row("self_attention.k_layernorm.weight", ("self_attn.k_proj.norm.weight",)),
    Row("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
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
    Row("mlp.linear_fc1.weight", ("mlp.up_proj.weight",)),
    Row("mlp.linear_fc1.bias", ("mlp.up_proj.bias",)),
    Row("mlp.linear_fc2.weight", ("mlp.down_proj.weight",)),
    Row("mlp.linear_fc2.bias", ("mlp.down_proj.bias",)),
)
ROUTER = (Row("mlp.router.weight", ("mlp.gate.weight",)),)
EXPERTS = (
    Row("mlp.experts.experts.linear_fc1.weight", ("mlp.experts.up_proj",)),
    Row("mlp.experts.experts.linear_fc2.weight", ("mlp.experts.down_proj",)),
)
"""Each a piece an expert."""
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
WITHOUT_STATE = ("embedding.word_embeddings", "output_layer", "mlp.router")
"""Layers with a weight of which no extra state is asked for; the coefficients' neither."""
CONTENT = {"singleton_local_shards": False}
"""That the blocks are stacked."""
BACKENDS = {
    **{"sharded_backend": "torch_dist", "sharded_backend_version": 1},
    **{"common_backend": "torch", "common_backend_version": 1},
}
"""What makes a folder one of torch_dist."""


class Checkpoints:
    """Reads and writes them."""

    def find(self, path: Path) -> Found | None:
        if any((path / name).exists() for name in ("common.pt", "metadata.json")):
            return Found(path)
        for folder in (path, Record(path).checkpoints):
            chosen = saved.newest(folder)
            listed = tuple(map(str, chosen.damaged))
            if chosen.path is not None:
                return Found(chosen.path, listed)
            if listed:
                raise PolycomError(f"no checkpoint is whole: {'; '.join(listed)}")
        return None

    def read(self, path: Path) -> Model:
        problem = saved.damage(path)
        if problem is not None:
            raise PolycomError(f"{Damaged(path, problem)}: name another checkpoint")
        folder = Folder(path)
        args = inert.load(path / "common.pt").get("args")
        if args is None:
            raise PolycomError(f"{path / 'common.pt'} holds no arguments, so nothing says what the model is")
        embedding = folder.tensors.get("embedding.word_embeddings.weight")
        if embedding is None:
            raise PolycomError(f"{path} holds no embedding.word_embeddings.weight, so no language model")
        config = architecture.configuration(args, embedding.shape[0], str(path))
        readers: dict[str, Callable[[], Any]] = {}
        for row, reader in _rows(folder, config):
            readers.update(row.read(reader, config))
        if config["tie_word_embeddings"]:
            readers.pop("lm_head.weight", None)
        return tokenizer.added(Model(config, readers, str(path)), path)

    def write(self, model: Model, folder: Path, options: Options, advance: Callable[[int], object]) -> None:
        arguments = architecture.arguments(model.config)
        (folder / RELEASE).mkdir()
        _write(model, folder / RELEASE, arguments, options, advance)
        tokenizer = {} if options.tokenizer is None else {"tokenizer.json": options.tokenizer}
        for name, path in {**model.files, **tokenizer}.items():
            shutil.copyfile(path, folder / name)
        write_text(folder / TRACKER, RELEASE)


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


def _block_rows(config: Mapping[str, Any], written: bool = False) -> Iterator[Row]:
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
            row = Row(row.theirs, (gate, *row.ours), Concatenated(-1 if row.theirs.endswith("bias") else -2))
        yield row
    theirs, ours = ACTIVATION[experts]
    entry, _ = parse(config["activation"]["name"])
    if entry.learnable:
        for name in entry.load()(**{}).state_dict():
            yield Row(theirs + name, (ours + name,))


def _write(
    model: Model, folder: Path, arguments: Namespace, options: Options, advance: Callable[[int], object]
) -> None:
    """A folder of torch_dist for any layout, for the local layers and for Transformer Engine's."""
    import torch

    def reader(name: str) -> Callable[[], Any]:
        def read() -> Any:
            tensor = model.tensors[name]()
            advance(tensor.nbytes)
            kept = options.dtype is None or ".act_fn." in name
            return tensor if kept else tensor.to(getattr(torch, str(options.dtype)))

        return read

    readers = {name: reader(name) for name in model.tensors}
    layers, experts = model.config["num_hidden_layers"], model.config["num_experts"]
    apart = {BLOCKS + row.theirs for row in EXPERTS}
    with Writer(folder, options.shard_bytes) as writer:
        for row, index in _written(model):
            tensor, of = row.write(readers, model.config), (layers,) if index else ()
            if row.theirs in apart:
                for expert, part in enumerate(tensor):
                    _piece(writer, row.theirs, part, (*index, expert), (*of, experts))
            else:
                _piece(writer, row.theirs, tensor, index, of)
    state = {"args": arguments, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": CONTENT}
    torch.save(state, folder / "common.pt")
    write_text(folder / "metadata.json", json.dumps(BACKENDS))


def _written(model: Model) -> Iterator[tuple[Row, tuple[int, ...]]]:
    """Each row that the model has something for, by whole names, and the place in the stack of blocks."""
    around = [row for row in AROUND if row.ours[0] in model.tensors]
    yield from ((row, ()) for row in around[:1])
    for layer in range(model.config["num_hidden_layers"]):
        for row in _block_rows(model.config, written=True):
            ours = tuple(f"model.layers.{layer}.{name}" for name in row.ours)
            if ours[0] in model.tensors:
                yield Row(BLOCKS + row.theirs, ours, row.layout), (layer,)
    yield from ((row, ()) for row in around[1:])


def _piece(writer: Writer, name: str, tensor: Any, index: tuple[int, ...], of: tuple[int, ...]) -> None:
    """A tensor, and the empty extra state of its layer, which Megatron asks for by the same place."""
    import torch

    writer.write(name, tensor, index, of)
    layer, _, kind = name.rpartition(".")
    if kind == "weight" and not layer.endswith((*WITHOUT_STATE, "activation_func")):
        place = f"{'.'.join(map(str, index or (0,)))}_{'.'.join(map(str, of or (1,)))}"
        writer.write_object(f"{layer}._extra_state/shard_{place}", [torch.empty(0, dtype=torch.uint8)])
