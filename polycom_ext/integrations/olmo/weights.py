"""The weights in OLMo's checkpoints, in every format it has saved them: name -> how to read one tensor.

    model.pt, model.safetensors                    unsharded
    rank*.pt                                       torch_legacy, a file a process
    model/metadata.json, model/rank_*.safetensors  olmo_core
    model_and_optim/.metadata, …                   torch_new, which newer torch saves but OLMo cannot load

Nothing that a file pickles is run, and neither OLMo nor as many processes as saved it are needed.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polycom_ext.checkpoints import inert
from polycom_ext.checkpoints.archive import Archive
from polycom_ext.checkpoints.sharded import METADATA, Folder
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.olmo.saved import TORCH_NEW

if TYPE_CHECKING:
    from torch import Tensor

Readers = dict[str, Callable[[], "Tensor"]]


def readers(folder: Path) -> Readers:
    """How to read each tensor, by its name in a model of ungrouped blocks that nothing wraps.

    Raises PolycomError for a format that cannot be read, and, then or later, for damage.
    """
    found = _of_format(folder)
    groups = {int(match[1]) for name in found if (match := re.search(r"block_groups\.0\.(\d+)\.", name))}
    return {_plain(name, len(groups)): read for name, read in found.items()}


def _of_format(folder: Path) -> Readers:
    if (folder / "model.safetensors").is_file():
        return _of_safetensors(folder / "model.safetensors")
    if (folder / "model.pt").is_file():
        return _of_archive(folder / "model.pt")
    if (folder / "rank0.pt").is_file():
        return _of_ranks(folder)
    if (folder / "model" / "metadata.json").is_file():
        return _of_olmo_core(folder / "model")
    if (folder / TORCH_NEW / METADATA).is_file():
        return _of_torch_new(folder / TORCH_NEW)
    if (folder / "model" / "rank0.pt").is_file():
        raise PolycomError(
            f"{folder} was saved by sharded_checkpointer: local, whose files only the torch that saved them "
            "reads: unshard it there, with upstream's scripts/unshard.py"
        )
    raise PolycomError(f"{folder} holds no weights of a format of OLMo's")


def _plain(name: str, group: int) -> str:
    """Without FSDP's part of a name, and with a block counted from the model's first."""
    name = name.replace("_fsdp_wrapped_module.", "")
    return re.sub(
        r"\.block_groups\.(\d+)\.(\d+)\.",
        lambda match: f".blocks.{int(match[1]) * group + int(match[2])}.",
        name,
    )


def _of_archive(path: Path) -> Readers:
    archive = Archive(path)
    return {name: _reader(archive.tensor, said) for name, said in _mapping(archive.content, path).items()}


def _reader(read: Callable[..., Tensor], *arguments: Any) -> Callable[[], Tensor]:
    return lambda: read(*arguments)


def _mapping(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict) or isinstance(content, inert.Named):
        raise PolycomError(f"{path} holds no state of a model")
    return content


def _of_safetensors(path: Path) -> Readers:
    """As upstream's scripts/convert_pt_to_safetensors.py writes it: a name is a pickle in base64."""
    from safetensors import SafetensorError, safe_open

    def read(key: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    found: Readers = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 it is no mapping
                (name,), _ = inert.loads(base64.urlsafe_b64decode(key))
                found[name] = _reader(read, key)
    except (SafetensorError, OSError, ValueError, TypeError, PolycomError):
        raise PolycomError(f"{path} cannot be read, or its names are not as OLMo writes them") from None
    return found


def _of_ranks(folder: Path) -> Readers:
    """FSDP shards the first dimension over ranks in their order; a hybrid's other replicas hold the same."""
    first = Archive(folder / "rank0.pt")
    states = {first: _mapping(first.content, first.path)}
    if "world_size" not in states[first]:
        raise PolycomError(f"{first.path} does not say how many processes have saved it")
    for rank in range(1, states[first]["world_size"]):
        archive = Archive(folder / f"rank{rank}.pt")
        states[archive] = _mapping(archive.content, archive.path)
    models = {archive: _mapping(state.get("model"), archive.path) for archive, state in states.items()}

    def read(name: str) -> Tensor:
        import torch

        size = _size_of_sharded(models[first][name])
        if size is None:
            return first.tensor(models[first][name])
        parts: list[Tensor] = []
        rows = 0
        for archive, model in models.items():
            for said in _shards(model, name, archive.path) if rows < size[0] else ():
                parts.append(archive.tensor(said))
                rows += len(parts[-1])
        if rows != size[0]:
            raise PolycomError(f"{folder} holds {rows} of the {size[0]} rows of {name}")
        return torch.cat(parts)

    return {name: _reader(read, name) for name in models[first]}


def _size_of_sharded(said: Any) -> tuple[int, ...] | None:
    """Of the whole of a ShardedTensor or DTensor; None of what is neither."""
    arguments: tuple[Any, ...] = getattr(said, "arguments", ())
    if len(arguments) != 4 or _class(arguments[1]) not in ("ShardedTensor", "DTensor"):
        return None
    size: tuple[int, ...] = arguments[2][2]
    return size


def _class(named: Any) -> str:
    return str(getattr(named, "path", "")).rpartition(".")[2]


def _shards(model: dict[str, Any], name: str, path: Path) -> list[Any]:
    """What a rank holds of a tensor: of its pickled state."""
    try:
        _, kind, _, state = model[name].arguments
        if _class(kind) == "DTensor":
            return [state[1]["_local_tensor"]]
        return [shard.state[1]["tensor"] if shard.state else shard.tensor for shard in state[0]]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise PolycomError(f"{path} holds nothing of {name}, or not as FSDP saves it") from None


def _of_olmo_core(folder: Path) -> Readers:
    """metadata.json says which parts of a flattened tensor a file holds, one behind the other."""
    try:
        told = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["tensors"]
        places = {
            name: (
                about["shape"],
                {file: spec["flattened_offsets"] for file, spec in about["shard_spec_per_file"].items()},
            )
            for name, about in told.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PolycomError(f"{folder / 'metadata.json'} cannot be read: {error}") from None

    def read(name: str) -> Tensor:
        import torch
        from safetensors import SafetensorError, safe_open

        shape, files = places[name]
        parts: dict[int, Tensor] = {}
        for file, offsets in files.items():
            try:
                with safe_open(folder / file, framework="pt") as opened:
                    lengths = [end - start for start, end in offsets]
                    pieces = opened.get_tensor(name).split(lengths)
            except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
                raise PolycomError(f"{folder / file} cannot be read: {error}") from None
            parts.update(
                (start, piece) for (start, _), piece in zip(offsets, pieces, strict=True) if len(piece)
            )
        starts = sorted(parts)
        ends = list(accumulate((len(parts[start]) for start in starts), initial=0))
        if starts != ends[:-1] or ends[-1] != math.prod(shape):
            raise PolycomError(f"{folder} holds only parts of {name}")
        return torch.cat([parts[start] for start in starts]).view(shape)

    return {name: _reader(read, name) for name in places}


def _of_torch_new(path: Path) -> Readers:
    folder = Folder(path)
    return {
        name.removeprefix("model."): _reader(folder.read, name)
        for name in folder.tensors
        if name.startswith("model.")
    }
