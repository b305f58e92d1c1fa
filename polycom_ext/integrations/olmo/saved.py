"""OLMo's checkpoints in a run's directory: which are whole, and which a run goes on from. Without torch.

    unsharded     stepN-unsharded/{model,optim,train}.pt, or .safetensors
    torch_legacy  stepN/rank*.pt
    olmo_core     stepN/{model,optim}/{metadata.json,rank_*.safetensors} and stepN/train/rank*.pt
    torch_new     stepN/model_and_optim/{.metadata,*.distcp}, of which only the weights are read

and each its config.yaml. OLMo gives a folder its name once it is written; damage comes later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from polycom_ext.checkpoints import inert
from polycom_ext.errors import PolycomError
from polycom_ext.runs.checkpoints import Choice, choose, problem_of_distributed, problem_of_file

TORCH_NEW = "model_and_optim"
"""Its folder in a checkpoint."""
_NAME = r"step(\d+)(-unsharded)?"


def choice(checkpoints: Path) -> Choice:
    """The newest whole checkpoint, of one step the sharded one before the unsharded, as upstream chooses.

    Raises PolycomError where there are some and none is whole: a start from scratch would write over them.
    """
    chosen = choose((step, path, _problem(path)) for step, _, path in _folders(checkpoints))
    if chosen.step is None and chosen.damaged:
        listed = "; ".join(map(str, chosen.damaged))
        raise PolycomError(f"no checkpoint is whole: {listed}; move {checkpoints} away to start anew")
    return chosen


def whole(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each whole one."""
    return [(step, path) for step, _, path in _folders(checkpoints) if _problem(path) is None]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder, by its name and by what is in it, is one, whole or not."""

    def has(*names: str) -> bool:
        return any((folder / name).exists() for name in names)

    named = re.fullmatch(_NAME, folder.name) is not None
    ours = has("model.pt", "rank0.pt", "model/metadata.json", TORCH_NEW)
    return (has("config.yaml") and (named or ours or has("model.safetensors"))) or (named and ours)


def choice_of_weights(checkpoints: Path) -> Choice:
    """The newest one whose weights are whole, whatever else it lacks."""
    found = ((step, path) for step, _, path in _folders(checkpoints) if is_checkpoint(path))
    return choose((step, path, problem_of_weights(path)) for step, path in found)


def problem_of_weights(folder: Path) -> str | None:
    """The end of a sentence about a checkpoint whose weights are not whole."""
    if not (folder / "config.yaml").is_file():
        return "lacks config.yaml"
    if any(folder.glob("rank*.pt")):
        return _problem_of_ranks(folder, "")
    if (folder / TORCH_NEW).is_dir():
        return problem_of_distributed(folder / TORCH_NEW)
    if (folder / "model" / "rank0.pt").is_file():
        return None  # a format that nothing here reads, as is said where it is tried
    if (folder / "model").is_dir():
        return _problem_of_shards(folder, "model")
    return _problem_of_part(folder, "model")


def prepare(checkpoints: Path) -> list[str]:
    """Move what is damaged aside, so that OLMo goes on from what is chosen; a sentence for each."""
    return [f"{damaged}; it is now {damaged.set_aside()}" for damaged in choice(checkpoints).damaged]


def _folders(checkpoints: Path) -> list[tuple[int, bool, Path]]:
    """(step, whether it is sharded, folder), the newest first."""
    matches = ((re.fullmatch(_NAME, path.name), path) for path in checkpoints.glob("step*"))
    found = ((int(name[1]), name[2] is None, path) for name, path in matches if name and path.is_dir())
    return sorted(found, reverse=True)


def _problem(folder: Path) -> str | None:
    if not (folder / "config.yaml").is_file():
        return "lacks config.yaml"
    if folder.name.endswith("-unsharded"):
        parts = ("model", "optim", "train")
        return _first(lambda part: _problem_of_part(folder, part), *parts)
    if any(folder.glob("rank*.pt")):
        return _problem_of_ranks(folder, "")
    return _first(lambda part: _problem_of_shards(folder, part), "model", "optim") or _problem_of_ranks(
        folder, "train/"
    )


def _problem_of_part(folder: Path, part: str) -> str | None:
    names = [f"{part}.safetensors"] if (folder / f"{part}.safetensors").exists() else [f"{part}.pt"]
    return _first(lambda name: problem_of_file(folder, name), *names)


def _problem_of_shards(folder: Path, part: str) -> str | None:
    """Its metadata.json says in which files each tensor lies."""

    def files(index: Path) -> list[str]:
        tensors = json.loads(index.read_text(encoding="utf-8"))["tensors"].values()
        return sorted({f"{part}/{file}" for tensor in tensors for file in tensor["shard_spec_per_file"]})

    return _problem_of_named(folder, f"{part}/metadata.json", files, "is none of olmo_core's")


def _problem_of_ranks(folder: Path, prefix: str) -> str | None:
    """There is a file of each process that has saved it; the first one says how many those were."""

    def files(first: Path) -> list[str]:
        return [f"{prefix}rank{rank}.pt" for rank in range(1, int(inert.load(first)["world_size"]))]

    return _problem_of_named(folder, f"{prefix}rank0.pt", files, "cannot be read")


def _problem_of_named(
    folder: Path, index: str, files: Callable[[Path], list[str]], otherwise: str
) -> str | None:
    """Of a file that says which others there are, or of those."""
    problem = problem_of_file(folder, index)
    if problem is not None:
        return problem
    try:
        names = files(folder / index)
    except (PolycomError, KeyError, TypeError, ValueError, AttributeError):  # written over
        return f"holds {index}, which {otherwise}"
    return _first(lambda name: problem_of_file(folder, name), *names)


def _first(problem: Callable[[str], str | None], *names: str) -> str | None:
    return next((found for found in map(problem, names) if found is not None), None)
