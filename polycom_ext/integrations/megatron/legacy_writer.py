"""Megatron's `torch` checkpoints, written: a file a rank of model parallelism.

Megatron looks for the names of its modules, which differ between its local layers and Transformer Engine's: a
file holds the same tensors under both, and either kind of layer takes what it knows.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polycom_ext.checkpoints.archive import Waiting
from polycom_ext.checkpoints.forms import Options, Ranks
from polycom_ext.checkpoints.model import Model, Row
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron.saved import MODEL, part
from polycom_ext.integrations.megatron.table import AROUND, BLOCKS, EXPERTS, Sharded, block_rows

if TYPE_CHECKING:
    from torch import Tensor

_DIVIDED = {
    "tensor": ("vocab_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    "pipeline": ("num_hidden_layers",),
    "expert": ("num_experts",),
}
"""Kind of parallelism -> what its ranks have equal shares of."""
_BY_EXPERT = {row.theirs for row in EXPERTS}
_IN_EXPERTS = "mlp.experts.experts."


def write(
    model: Model, folder: Path, arguments: Namespace, options: Options, advance: Callable[[int], object]
) -> None:
    """The files of so many ranks as are asked for. Raises PolycomError where they cannot share the model.

    In memory is one tensor of a block's, of experts that of all; the rest waits on the disk.
    """
    import torch

    ranks = options.ranks
    _check(model, ranks)
    vars(arguments).update({f"{kind}_model_parallel_size": vars(ranks)[kind] for kind in _DIVIDED})
    arguments.expert_tensor_parallel_size = ranks.tensor
    told = {"args": arguments, "checkpoint_version": 3.0, "iteration": 0}
    for stage in range(ranks.pipeline):
        states: dict[tuple[int, int], dict[str, Tensor]] = {
            rank: {} for rank in product(range(ranks.tensor), range(ranks.expert))
        }
        with Waiting(folder / "weights") as waiting:
            for prefix, ours, rows in _of_stage(model, stage, ranks.pipeline):
                tensors = tuple(_typed(model.tensors[name](), name, options.dtype) for name in ours)
                for tensor in tensors:
                    advance(tensor.nbytes)
                for holders, names, share in _shares(rows, tensors, model.config, ranks):
                    kept = waiting.add(share)
                    for rank in holders:
                        states[rank].update(dict.fromkeys((prefix + name for name in names), kept))
            sizes = (ranks.tensor, ranks.pipeline, ranks.expert)
            for (of_tensor, of_experts), state in states.items():
                place = part((of_tensor, stage, of_experts), sizes)
                (folder / place).mkdir()
                torch.save({**told, "model": state}, folder / place / MODEL)


def _check(model: Model, ranks: Ranks) -> None:
    for kind, names in _DIVIDED.items():
        count = vars(ranks)[kind]
        for name in names:
            if count > 1 and (model.config[name] % count or not model.config[name]):
                raise PolycomError(
                    f"{model.source} has {name} {model.config[name]}, which {count} ranks of {kind} "
                    f"parallelism cannot share equally: choose another --{kind}-parallel"
                )


def _of_stage(model: Model, stage: int, stages: int) -> Iterator[tuple[str, tuple[str, ...], list[Row]]]:
    """What a stage of the pipeline holds: prefix of names, ours, and the rows for either kind of layer."""
    embedding, *after = AROUND
    last = stage == stages - 1
    if stage == 0:
        yield "", embedding.ours, [embedding]
    layers = model.config["num_hidden_layers"] // stages
    together: dict[tuple[str, ...], list[Row]] = {}
    for row in block_rows(model.config):
        together.setdefault(row.ours, []).append(row)
    for layer in range(layers):
        for inside, rows in together.items():
            ours = tuple(f"model.layers.{stage * layers + layer}.{name}" for name in inside)
            if ours[0] in model.tensors:
                yield f"{BLOCKS}{layer}.", ours, rows
    for row in after if last else ():
        if row.ours[0] in model.tensors:
            yield "", row.ours, [row]
    if last and stages > 1 and model.config["tie_word_embeddings"]:
        yield "", embedding.ours, [Sharded(after[-1].theirs, embedding.ours)]  # a copy of the first stage's


def _shares(
    rows: list[Row], tensors: tuple[Tensor, ...], config: dict[str, Any], ranks: Ranks
) -> Iterator[tuple[list[tuple[int, int]], list[str], Tensor]]:
    """(tensor and expert rank) of those who hold a share, its names there, and what it is."""
    row = rows[0]
    tensor_ranks, expert_ranks = range(ranks.tensor), range(ranks.expert)
    local = config["num_experts"] // ranks.expert
    if row.theirs in _BY_EXPERT:
        for expert in range(config["num_experts"]):
            rank, number = divmod(expert, local)
            kind = row.theirs.removeprefix(_IN_EXPERTS)
            names = [f"mlp.experts.local_experts.{number}.{kind}", f"mlp.experts.{kind}{number}"]
            for t, share in enumerate(_split(row, tuple(one[expert] for one in tensors), config, ranks)):
                yield [(t, rank)], names, share
        return
    names = [name for one in rows for name in _names(one.theirs, local)]
    shares = _split(row, tensors, config, ranks)
    if not isinstance(row, Sharded):
        yield list(product(tensor_ranks, expert_ranks)), names, shares[0]
        return
    for t, share in enumerate(shares):
        yield [(t, e) for e in expert_ranks], names, share


def _split(row: Row, tensors: tuple[Tensor, ...], config: dict[str, Any], ranks: Ranks) -> list[Tensor]:
    """Theirs, for each rank of tensor parallelism, or for all."""
    if not isinstance(row, Sharded):
        return [row.layout.join(tensors, config)]
    of_a_rank = dict(config)
    for key in ("num_attention_heads", "num_key_value_heads"):
        of_a_rank[key] //= ranks.tensor
    parts = zip(*(tensor.chunk(ranks.tensor, dim=row.dim) for tensor in tensors), strict=True)
    return [row.layout.join(part, of_a_rank) for part in parts]


def _names(theirs: str, local: int) -> list[str]:
    """Of torch_dist's name; the experts share an activation, and each names it."""
    inside = theirs.removeprefix(_IN_EXPERTS)
    if inside == theirs:
        return [theirs]
    return [f"mlp.experts.{inside}", *(f"mlp.experts.local_experts.{n}.{inside}" for n in range(local))]


def _typed(tensor: Tensor, name: str, dtype: str | None) -> Tensor:
    import torch

    return tensor if dtype is None or ".act_fn." in name else tensor.to(getattr(torch, dtype))
