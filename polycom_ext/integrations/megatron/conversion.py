"""Megatron's checkpoints as models apart from it, without it: `torch_dist` and `torch`, read and written.

One of torch_dist holds whole tensors, whatever the layout of the run that saved it (tensor, pipeline,
expert, data parallel, distributed optimizer); the blocks of a model are stacked along the first dimension
where they are alike, and stand one by one where they are not. What the model is, its saved arguments say.
"""

from __future__ import annotations

import json
import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from polycom_ext.checkpoints import inert
from polycom_ext.checkpoints.forms import Found, Options
from polycom_ext.checkpoints.model import Model, Row
from polycom_ext.checkpoints.sharded import Folder, Writer
from polycom_ext.errors import PolycomError
from polycom_ext.files import write_text
from polycom_ext.integrations.megatron import architecture, legacy_writer, saved
from polycom_ext.integrations.megatron.legacy import Parts, of_core
from polycom_ext.integrations.megatron.saved import PARTS, RELEASE, TRACKER
from polycom_ext.integrations.megatron.table import AROUND, BLOCKS, EXPERTS, WITHOUT_STATE, block_rows
from polycom_ext.runs import tokenizer
from polycom_ext.runs.checkpoints import Damaged
from polycom_ext.runs.record import Record

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
        if any(path.glob(PARTS)):
            return Found(path) if of_core(path) else None
        for folder in (path, Record(path).checkpoints):
            chosen = saved.newest(folder)
            listed = tuple(map(str, chosen.damaged))
            there = [damaged.path for damaged in chosen.damaged] + ([chosen.path] if chosen.path else [])
            if any(any(one.glob(PARTS)) and not of_core(one) for one in there):
                continue
            if chosen.path is not None:
                return Found(chosen.path, listed)
            if listed:
                raise PolycomError(f"no checkpoint is whole: {'; '.join(listed)}")
        return None

    def read(self, path: Path) -> Model:
        problem = saved.damage(path)
        if problem is not None:
            raise PolycomError(f"{Damaged(path, problem)}: name another checkpoint")
        folder = Parts(path) if any(path.glob(PARTS)) else Whole(path)
        config = folder.config
        readers: dict[str, Callable[[], Any]] = {}
        for row, reader in _rows(folder, config):
            readers.update(row.read(reader, config))
        if config["tie_word_embeddings"]:
            readers.pop("lm_head.weight", None)
        return tokenizer.added(Model(config, readers, str(path)), path)

    def write(self, model: Model, folder: Path, options: Options, advance: Callable[[int], object]) -> None:
        _write(model, folder, options, advance, _torch_dist)


class ByRank:
    """Writes `torch`, in files of ranks, which load in the layout that they were written for."""

    by_rank = True

    def write(self, model: Model, folder: Path, options: Options, advance: Callable[[int], object]) -> None:
        _write(model, folder, options, advance, legacy_writer.write)


CHECKPOINTS = Checkpoints()
BY_RANK = ByRank()


class Whole(Folder):
    """A folder of torch_dist, which knows its model."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        args = inert.load(path / "common.pt").get("args")
        if args is None:
            raise PolycomError(f"{path / 'common.pt'} holds no arguments, so nothing says what the model is")
        embedding = self.tensors.get(AROUND[0].theirs)
        if embedding is None:
            raise PolycomError(f"{path} holds no {AROUND[0].theirs}, so no language model")
        self.config = architecture.configuration(args, embedding.shape[0], str(path))


def _rows(folder: Whole | Parts, config: dict[str, Any]) -> Iterator[tuple[Row, Callable[[], Any]]]:
    """Each row that the checkpoint has a tensor for, by whole names, with how to read that tensor."""
    around = {row.theirs: row for row in AROUND}
    inside = {row.theirs: row for row in block_rows(config)}
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


def _reader(folder: Whole | Parts, name: str, index: tuple[int, ...]) -> Callable[[], Any]:
    return lambda: folder.read(name, index)


def _write(
    model: Model,
    folder: Path,
    options: Options,
    advance: Callable[[int], object],
    weights: Callable[[Model, Path, Namespace, Options, Callable[[int], object]], None],
) -> None:
    """A folder for `--load`: the weights as a release, what goes with them, and the tracker."""
    arguments = architecture.arguments(model.config)
    (folder / RELEASE).mkdir()
    weights(model, folder / RELEASE, arguments, options, advance)
    given = {} if options.tokenizer is None else {"tokenizer.json": options.tokenizer}
    for name, path in {**model.files, **given}.items():
        shutil.copyfile(path, folder / name)
    write_text(folder / TRACKER, RELEASE)


def _torch_dist(
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
        for row in block_rows(model.config, written=True):
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
