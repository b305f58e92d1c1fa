"""Megatron's checkpoints in a run's directory: which are whole, and which a run goes on from. Without torch.

torch_dist               iter_N/{.metadata,*.distcp,common.pt,metadata.json}
torch_dcp, fsdp_dtensor  iter_N/{.metadata,*.distcp}
torch                    iter_N/mp_rank_TT[_PPP][_EEE]/{model_optim_rng,distrib_optim}.pt
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from polycom_ext.errors import PolycomError
from polycom_ext.files import write_text
from polycom_ext.integrations.megatron import checks
from polycom_ext.runs.checkpoints import Choice, Damaged, choose, problem_of_distributed, problem_of_file
from polycom_ext.runs.spec import Spec

TRACKER = "latest_checkpointed_iteration.txt"
"""The file by which Megatron knows what to resume from; it is not written atomically."""
RELEASE = "release"
"""What it names, and the folder of, weights without a training's state, which load at iteration 0."""
_ABSENT = "is not there"
MODEL, _OPTIMIZER = "model_optim_rng.pt", "distrib_optim.pt"
PARTS = "mp_rank_*"


def choice(spec: Spec, checkpoints: Path) -> Choice:
    """The checkpoint that the tracker names, or the newest whole one before it; any, if it names none.

    There may be none, or but a first one that was never written to its end. Raises PolycomError where there
    was more, and none is whole: a start from scratch would write over what was trained.
    """
    named, problem = _tracked(checkpoints)
    folders = [(step, path) for step, path in _folders(checkpoints) if named is None or step <= named]
    chosen = choose((step, path, _problem(spec, path)) for step, path in folders)
    never_ended = problem == _ABSENT and not any((path / ".metadata").exists() for _, path in folders)
    if chosen.step is not None or never_ended:
        return chosen
    if not folders:
        raise PolycomError(
            f"{checkpoints / TRACKER} {problem}, and no checkpoint is there: remove that file to start anew"
        )
    listed = "; ".join(map(str, chosen.damaged))
    raise PolycomError(f"no checkpoint is whole: {listed}; move {checkpoints} away to start anew")


def newest(checkpoints: Path) -> Choice:
    """As `choice`, where no spec says in which form the checkpoints are, or whether there are any."""
    folder = tracked(checkpoints)
    if folder == checkpoints / RELEASE:
        return choose([(0, folder, damage(folder))])
    named, _ = _tracked(checkpoints)
    folders = [(step, path) for step, path in _folders(checkpoints) if named is None or step <= named]
    return choose((step, path, damage(path)) for step, path in folders)


def tracked(checkpoints: Path) -> Path | None:
    """The folder that the tracker names, whether it is there or not; None where it names none."""
    iteration, _ = _tracked(checkpoints)
    if iteration is not None:
        return checkpoints / f"iter_{iteration:07d}"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if (checkpoints / TRACKER).read_text(encoding="utf-8").strip() == RELEASE:
            return checkpoints / RELEASE
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint of torch_dist or torch, as far as it is known without its layout."""
    parts = sorted(path.name for path in folder.glob(PARTS))
    return _problem_of_parts(folder, parts) if parts else _problem_of_torch_dist(folder)


def whole(spec: Spec, checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each whole one, up to what the tracker names."""
    named, _ = _tracked(checkpoints)
    folders = [(step, path) for step, path in _folders(checkpoints) if step <= (named or 0)]
    return [(step, path) for step, path in folders if _problem(spec, path) is None]


def prepare(spec: Spec, checkpoints: Path) -> list[str]:
    """Have Megatron go on from what is chosen; a sentence for each thing that was in the way.

    What is damaged, or newer and never written to its end, is moved aside, and the tracker says what is left.
    """
    chosen = choice(spec, checkpoints)
    named, problem = _tracked(checkpoints)
    newer = [
        (path, _problem(spec, path)) for step, path in _folders(checkpoints) if step > (chosen.step or 0)
    ]
    unfinished = [Damaged(path, problem) for path, problem in newer if problem is not None]
    said = [f"{damaged}; it is now {damaged.set_aside()}" for damaged in unfinished]
    if chosen.step is not None and chosen.step != named:
        if problem:
            said.append(f"{checkpoints / TRACKER} {problem}")
        write_text(checkpoints / TRACKER, str(chosen.step))
    return said


def _tracked(checkpoints: Path) -> tuple[int | None, str | None]:
    """The iteration that the tracker names, and what is wrong with that."""
    try:
        text = (checkpoints / TRACKER).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None, _ABSENT
    except (OSError, UnicodeDecodeError) as error:
        return None, f"cannot be read ({getattr(error, 'strerror', None) or 'it is no text'})"
    if not (text.isascii() and text.isdigit()):
        return None, f"names {text[:40]!r}, which is no iteration" if text else "is empty"
    there = (checkpoints / f"iter_{int(text):07d}").is_dir()
    return int(text), None if there else f"names iteration {int(text)}, whose folder is not there"


def _folders(checkpoints: Path) -> list[tuple[int, Path]]:
    """(iteration, folder), the newest first."""
    matches = ((re.fullmatch(r"iter_(\d{7,})", path.name), path) for path in checkpoints.glob("iter_*"))
    return sorted(((int(name[1]), path) for name, path in matches if name and path.is_dir()), reverse=True)


def _problem(spec: Spec, folder: Path) -> str | None:
    format_ = spec.options.get("ckpt-format", "torch_dist")
    distributed = (folder / ".metadata").exists() or any(folder.glob("*.distcp"))
    if any(folder.glob(PARTS)) or (format_ == "torch" and not distributed):
        return _problem_of_parts(folder, _parts(spec))
    if format_ in ("torch_dcp", "fsdp_dtensor"):
        return problem_of_distributed(folder)
    return _problem_of_torch_dist(folder)


def _problem_of_torch_dist(folder: Path) -> str | None:
    problems = (problem_of_file(folder, name) for name in ("metadata.json", "common.pt"))
    return next((found for found in problems if found is not None), None) or problem_of_distributed(folder)


def _problem_of_parts(folder: Path, parts: list[str]) -> str | None:
    """Each part of the model has a folder; with the distributed optimizer, a file of that in each."""
    names = [MODEL, *([_OPTIMIZER] if any((folder / part / _OPTIMIZER).exists() for part in parts) else [])]
    problems = (problem_of_file(folder, f"{part}/{name}") for part in parts for name in names)
    return next((found for found in problems if found is not None), None)


def _parts(spec: Spec) -> list[str]:
    """For the ranks of the spec's layout."""
    tensor, pipeline, expert = (
        checks.integer(spec, f"{kind}-model-parallel-size", 1) or 1
        for kind in ("tensor", "pipeline", "expert")
    )
    expert_tensor = checks.integer(spec, "expert-tensor-parallel-size", tensor) or tensor
    sizes = tensor, pipeline, expert
    names = set()
    for rank in range(max(spec.world_size // pipeline, 1)):
        for stage in range(pipeline):
            names.add(part((rank % tensor, stage, rank // expert_tensor % expert), sizes))
    return sorted(names)


def part(rank: tuple[int, ...], sizes: tuple[int, ...]) -> str:
    """Upstream's `get_checkpoint_name` of ranks of tensor, pipeline and expert parallelism of so many."""
    (tensor, stage, expert), (_, stages, experts) = rank, sizes
    name = f"mp_rank_{tensor:02d}"
    name += f"_{stage:03d}" if stages > 1 else ""
    return name + (f"_{expert:03d}" if experts > 1 else "")
