"""Megatron's `torch` checkpoints, a file a rank of model parallelism, as if they were whole.

Each part holds the state of its rank's modules; the rows of the table say along which dimension ranks of
tensor parallelism share a tensor. Nothing that the files pickle is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polycom_ext.checkpoints import inert
from polycom_ext.checkpoints.archive import Archive
from polycom_ext.checkpoints.model import Row
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron import architecture
from polycom_ext.integrations.megatron.saved import MODEL, PARTS, part
from polycom_ext.integrations.megatron.table import AROUND, BLOCKS, EXPERTS, Sharded, block_rows

if TYPE_CHECKING:
    from torch import Tensor

_RENAMED = (
    (r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(linear_fc\d\.\w+)", r"mlp.experts.experts.\g<2>"),
    (r"mlp\.experts\.(linear_fc\d\.weight)(?P<expert>\d+)", r"mlp.experts.experts.\1"),
    (r"mlp\.experts\.(activation_func\.\w+)", r"mlp.experts.experts.\1"),
)
"""Name of a block's -> that of torch_dist; experts one after the other, and grouped."""
_SAID_AGAIN = re.compile(r"_extra_state\d*$|^mlp\.experts\.local_experts\.\d+\.activation_func\.")
"""No weights, or the ones that a block's experts share."""


@dataclass
class Stored:
    """A tensor: for each expert, or once, where its parts on the ranks of tensor parallelism are."""

    parts: dict[int, dict[int, tuple[Archive, Any]]] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    """No stack of blocks."""


class Parts:
    """A checkpoint, open for reading. Raises PolycomError for a part that is missing or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        first = Archive(path / min(folder.name for folder in path.glob(PARTS)) / MODEL)
        args = _args(first)
        self._sizes = _sizes(args, path)
        archives = {
            rank: Archive(path / part(rank, self._sizes) / MODEL)
            for rank in product(*map(range, self._sizes))
        }
        self.tensors: dict[str, Stored] = {}
        self._take(archives, getattr(args, "num_experts", None) or 0)
        embedding = self.tensors.get(AROUND[0].theirs)
        if embedding is None:
            raise PolycomError(f"{path} holds no {AROUND[0].theirs}, so no language model of Megatron's core")
        vocabulary = sum(archive.tensor(said).shape[0] for archive, said in embedding.parts[0].values())
        self.config = architecture.configuration(args, vocabulary, str(path))
        inside = {row.theirs: row for row in block_rows(self.config)}
        self._rows: dict[str, Row] = {**{row.theirs: row for row in AROUND}, **inside}

    def _take(self, archives: Mapping[tuple[int, ...], Archive], experts: int) -> None:
        """Blocks are numbered within a virtual stage of a pipeline; those come in turns of the pipeline."""
        tensor, pipeline, expert = map(range, self._sizes)
        layers = 0
        for chunk in _chunks(archives[0, 0, 0]):
            for stage in pipeline:
                here = 0
                for e, t in product(expert, tensor):
                    archive = archives[t, stage, e]
                    for name, said in _modules(archive, chunk).items():
                        match = re.fullmatch(rf"{re.escape(BLOCKS)}(\d+)\.(.+)", name)
                        inner, number = _torch_dist(match[2] if match else name)
                        here = max(here, int(match[1]) + 1) if match else here
                        if _SAID_AGAIN.search(inner) or (number is None and e):
                            continue
                        place = f"{BLOCKS}{layers + int(match[1])}.{inner}" if match else inner
                        stored = self.tensors.setdefault(place, Stored())
                        at = 0 if number is None else e * (experts // len(expert)) + number
                        stored.parts.setdefault(at, {})[t] = archive, said
                layers += here

    def read(self, name: str, index: tuple[int, ...] = ()) -> Tensor:
        """A tensor of all ranks."""
        import torch

        row = self._rows[re.sub(rf"^{re.escape(BLOCKS)}\d+\.", "", name)]
        parts = self.tensors[name].parts
        whole = [self._joined(row, list(parts[expert].values())) for expert in sorted(parts)]
        return torch.stack(whole) if row.theirs in _BY_EXPERT else whole[0]

    def _joined(self, row: Row, parts: list[tuple[Archive, Any]]) -> Tensor:
        import torch

        tensors = [archive.tensor(said) for archive, said in parts]
        if len(tensors) == 1 or not isinstance(row, Sharded):
            return tensors[0]
        of_a_rank = dict(self.config)
        for key in ("num_attention_heads", "num_key_value_heads"):
            of_a_rank[key] //= len(tensors)
        split = [row.layout.split(tensor, of_a_rank) for tensor in tensors]
        ours = tuple(torch.cat(each, dim=row.dim) for each in zip(*split, strict=True))
        return row.layout.join(ours, self.config)


def of_core(path: Path) -> bool:
    """Whether a checkpoint, unless it is damaged, is of the models of Megatron's core, not of older ones."""
    for file in sorted(path.glob(f"{PARTS}/{MODEL}"))[:1]:
        try:
            content = inert.load(file)
        except PolycomError:
            return True
        model = content.get("model") if isinstance(content, dict) else None
        return not (isinstance(model, dict) and "language_model" in model)
    return False


_BY_EXPERT = {row.theirs for row in EXPERTS}


def _args(archive: Archive) -> Any:
    content = archive.content
    args = content.get("args") if isinstance(content, dict) else None
    if args is None:
        raise PolycomError(f"{archive.path} holds no arguments, so nothing says what the model is")
    return args


def _sizes(args: Any, path: Path) -> tuple[int, int, int]:
    """Ranks of tensor, pipeline and expert parallelism."""
    tensor, pipeline, expert = (
        getattr(args, f"{kind}_model_parallel_size", None) or 1 for kind in ("tensor", "pipeline", "expert")
    )
    experts = getattr(args, "num_experts", None)
    if (getattr(args, "expert_tensor_parallel_size", None) or tensor) != tensor and experts:
        raise PolycomError(
            f"{path} is of --ckpt-format torch, whose files do not say of which rank of expert tensor "
            "parallelism they are: load it with Megatron and save it as torch_dist"
        )
    return tensor, pipeline, expert


def _chunks(archive: Archive) -> list[str]:
    """The keys of the virtual stages, in their order."""
    found = (re.fullmatch(r"model(\d*)", key) for key in archive.content if isinstance(key, str))
    return sorted((match[0] for match in found if match), key=lambda key: int(key[5:] or 0))


def _modules(archive: Archive, chunk: str) -> dict[str, Any]:
    modules = archive.content.get(chunk) if isinstance(archive.content, dict) else None
    if not isinstance(modules, dict):
        raise PolycomError(f"{archive.path} holds no {chunk}")
    return modules


def _torch_dist(name: str) -> tuple[str, int | None]:
    """The name in torch_dist, and the number of the expert among the rank's own."""
    for pattern, by in _RENAMED:
        match = re.fullmatch(pattern, name)
        if match:
            expert = match.groupdict().get("expert")
            return match.expand(by), None if expert is None else int(expert)
    return name, None
