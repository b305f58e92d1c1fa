"""What the nodes of a run are, told by each of them, and what is wrong with one of them or between them.

`look` finds the facts of a node, JSON has them; `compare` makes a sentence of each thing that is wrong.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import util
from pathlib import Path
from typing import Any

import polycom_ext
from polycom_ext import upstream
from polycom_ext._version import __version__
from polycom_ext.errors import PolycomError
from polycom_ext.machine import look as machine
from polycom_ext.machine import nvidia, probe
from polycom_ext.runs import secrets
from polycom_ext.runs.adapter import trees
from polycom_ext.runs.plan import Run
from polycom_ext.runs.wishes import GB, Wishes
from polycom_ext.upstream.trees import State

Facts = Mapping[str, Any]
Nodes = Mapping[int, tuple[str, Facts]]
"""rank -> (host, its facts)"""

MUCH_USED = 0.05
"""Of a GPU's memory, by somebody else."""
SAMPLE_BYTES = 1 << 20
"""So much of the beginning and of the end of a data file is compared, beside its size."""


def look(run: Run | None, wishes: Wishes, folder: Path = Path()) -> dict[str, Any]:
    """The facts of this node, without a run those of the machine alone; `problem` keeps a run from starting.

    Checks that are not wanted are not made, but for those that a run makes before it starts in any case.
    """
    facts: dict[str, Any] = {}
    gpus = nvidia.look()
    visible = visible_of(gpus.gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    facts["gpus"] = {
        "problem": gpus.problem,
        "driver": gpus.version,
        "gpus": [asdict(gpu) for gpu in visible],
    }
    if wishes.wants("package"):
        facts["package"] = {"polycom-ext": f"{__version__} (files {_digest_of_package()})"}
    if wishes.wants("versions"):
        facts["versions"] = _versions(bool(gpus.gpus))
    if wishes.wants("disk"):
        free = machine.folder(machine.RUNS, folder.absolute() if run is None else run.directory.path)
        facts["disk"] = {"path": free.path, "free": free.free, "writable": free.writable}
    if run is None:
        return facts
    if wishes.wants("spec"):
        facts["spec"] = {run.directory.spec.name: _digest(run.directory.spec.read_bytes())}
    try:
        check(run)
        if wishes.wants("trees"):
            facts["trees"] = _trees(run)
        if wishes.wants("data"):
            facts["data"] = dict(_data(run))
    except (PolycomError, OSError) as error:
        facts["problem"] = str(error).removeprefix(f"{run.name}: ")
    return facts


def check(run: Run) -> None:
    """Raise PolycomError for a file, a tree or a secret that is not there, on this node or in this image."""
    secrets.check(run.command.environment)
    run.adapter.check_inputs(run.spec)
    for name in trees(run.adapter, run.spec):
        if not upstream.tree(name).exists():
            raise PolycomError(f"{upstream.tree(name)} is not there: `polycom upstream apply {name}`")


def visible_of(gpus: Sequence[nvidia.Gpu], named: str | None) -> list[nvidia.Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names, by index or the beginning of an id, in its order; else all."""
    if named is None or "MIG" in named:
        return list(gpus)
    names = [name.strip() for name in named.split(",") if name.strip()]
    return [gpu for name in names for gpu in gpus if name == str(gpu.index) or gpu.uuid.startswith(name)]


def compare(nodes: Nodes, processes: int | None, wishes: Wishes) -> list[str]:
    """What is wrong, a sentence each that names the node; nothing where all is well.

    Args:
        processes: of the run on each node, which are on its first GPUs; None for no run, so that all count.
    """
    found = [
        f"{_name(nodes, rank)}: {facts['problem']}"
        for rank, (_, facts) in nodes.items()
        if "problem" in facts
    ]
    for rank, (_, facts) in nodes.items():
        for sentence in (*_gpus(facts, processes, wishes), *_disk(facts, wishes), *_clock(facts, wishes)):
            found.append(f"{_name(nodes, rank)} {sentence}")
    for kind in ("package", "spec", "trees", "versions", "data"):
        found += _differences(nodes, kind)
    if wishes.wants("gpus"):
        found += _differences(nodes, "gpu models")
    return found


def table(nodes: Nodes) -> str:
    """What each node has, a line each."""
    lines = []
    for rank, (host, facts) in nodes.items():
        told = {**facts.get("package", {}), **facts.get("versions", {}), **_models(facts)}
        if "disk" in facts:
            told["free"] = f"{facts['disk']['free'] / GB:.3g} GB in {facts['disk']['path']}"
        if "ahead" in facts:
            told["clock"] = f"{facts['ahead']:+.2f} s"
        said = ", ".join(f"{name} {value}" for name, value in told.items())
        lines.append(f"node {rank:<3} {host:20}  {said}")
    return "\n".join(lines)


def slow(measured: Mapping[str, Any], nodes: Nodes, floor: float) -> str:
    """What is wrong with the network that `runs.bandwidth` has measured; nothing where it is fast enough."""
    reached = measured["all_reduce"]
    if reached >= floor:
        return ""
    reaches = f"reaches {reached:.3g} GB/s, and preflight.bandwidth is {floor:g}"
    sentence = f"the all-reduce over all processes {reaches}"
    links = {int(rank): speed for rank, speed in measured.get("links", {}).items()}
    if links:
        rank = min(links, key=lambda one: links[one])
        way = f"from {_name(nodes, rank)} to {_name(nodes, rank + 1)}"
        sentence += f"; the slowest way is that {way}, {links[rank]:.3g} GB/s"
    return sentence


def _versions(gpus: bool) -> dict[str, str]:
    """Of what is imported on every node; torch, which takes seconds to import, is only asked on GPUs."""
    found = {"Python": platform.python_version()}
    if gpus:
        told, problem = probe.ask("torch")
        about = {"torch": told.get("version"), "CUDA": told.get("cuda"), "NCCL": told.get("nccl")}
        return {**found, **{name: str(value or problem or "none") for name, value in about.items()}}
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {**found, "torch": "none"}
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    for name, variable in {"torch": "__version__", "CUDA": "cuda", "torch's commit": "git_version"}.items():
        told_by = re.search(rf"^{variable}\b[^=]*= *['\"]([^'\"]+)", text, re.MULTILINE)
        if told_by is not None:
            found[name] = told_by[1]
    return found


def _trees(run: Run) -> dict[str, str]:
    """Raises PolycomError for a tree that is not as the run needs it."""
    found = {}
    for name in trees(run.adapter, run.spec):
        about = upstream.state(name)
        state = about["state"]
        found[name] = f"{about['version']}, {state}"
        if run.adapter.needs_patches(run.spec) and state != State.APPLIED.title:
            raise PolycomError(f"{about['tree']} is {state}: `polycom upstream apply {name}` there")
    return found


def _data(run: Run) -> Iterator[tuple[str, str]]:
    """File -> its size and a digest of a sample of it."""
    folders: dict[Path, list[Path]] = {}  # each listed once: a corpus has thousands of prefixes
    for name in run.adapter.facts(run.spec).data:
        path = Path(name)
        if path.parent not in folders:
            folders[path.parent] = sorted(path.parent.glob("*"))
        prefix = f"{path.name}."
        for file in (
            [path] if path.is_file() else (one for one in folders[path.parent] if one.name.startswith(prefix))
        ):
            with file.open("rb") as opened:
                size = opened.seek(0, os.SEEK_END)
                opened.seek(0)
                sample = opened.read(SAMPLE_BYTES)
                opened.seek(max(0, size - SAMPLE_BYTES))
                yield str(file), f"{size} bytes ({_digest(sample + opened.read())})"


def _digest_of_package() -> str:
    home = Path(polycom_ext.__file__).parent
    files = sorted(path for path in home.rglob("*.py"))
    return _digest(b"".join(f"{path.relative_to(home)}\0".encode() + path.read_bytes() for path in files))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _gpus(facts: Facts, processes: int | None, wishes: Wishes) -> Iterator[str]:
    about = facts.get("gpus")
    if about is None:
        return
    gpus = about["gpus"]
    if wishes.wants("health") and about["problem"]:
        yield f"has a driver that fails: {about['problem']}"
    if wishes.wants("gpus") and gpus and len(gpus) < (processes or 0):
        yield f"has {len(gpus)} GPU{'s' * (len(gpus) > 1)}, and the run has {processes} processes a node"
    for gpu in gpus[:processes]:
        name = f"has a GPU {gpu['index']} ({gpu['name']})"
        if wishes.wants("health") and gpu["faults"]:
            yield f"{name} that is not healthy: {'; '.join(gpu['faults'])}"
        if wishes.wants("health") and gpu["slowed"]:
            yield f"{name} that is {', '.join(gpu['slowed'])}"
        if wishes.wants("idle") and (used_by := _others(gpu)):
            yield f"{name} that is in use by {used_by}"


def _others(gpu: Facts) -> str:
    if gpu["processes"]:
        return ", ".join(f"{one['name']} (process {one['pid']})" for one in gpu["processes"])
    used, memory = gpu["used_mib"], gpu["memory_mib"]
    if used is not None and memory and used > MUCH_USED * memory:
        return f"processes that are not seen from there, with {used} MiB"
    return ""


def _disk(facts: Facts, wishes: Wishes) -> Iterator[str]:
    disk = facts.get("disk")
    if disk is None:
        return
    if not disk["writable"]:
        yield f"cannot write to {disk['path']}"
    elif disk["free"] < wishes.disk:
        free, floor = disk["free"] / GB, wishes.disk / GB
        yield f"has {free:.3g} GB free in {disk['path']}, and preflight.disk is {floor:.3g} GB"


def _clock(facts: Facts, wishes: Wishes) -> Iterator[str]:
    ahead = facts.get("ahead", 0.0)
    if wishes.wants("clock") and abs(ahead) > wishes.clock:
        off = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'}"
        yield f"has a clock that is {off} that of node 0, and preflight.clock is {wishes.clock:g} s"


def _differences(nodes: Nodes, kind: str) -> Iterator[str]:
    """Where not all nodes have the same: those that are not as most are. Of two halves node 0's is right."""
    told = {rank: _told(facts, kind) for rank, (_, facts) in nodes.items() if "problem" not in facts}
    for name in dict.fromkeys(name for values in told.values() for name in values):
        values = {rank: one.get(name, "none") for rank, one in told.items()}
        usual, _ = Counter(values.values()).most_common(1)[0]
        model = next(rank for rank, value in values.items() if value == usual)
        for rank, value in values.items():
            if value != usual:
                yield f"{_name(nodes, rank)} has {name} {value}, but {_name(nodes, model)} has {usual}"


def _told(facts: Facts, kind: str) -> Mapping[str, str]:
    return _models(facts) if kind == "gpu models" else facts.get(kind, {})


def _models(facts: Facts) -> Mapping[str, str]:
    names = Counter(gpu["name"] for gpu in facts["gpus"]["gpus"])
    told = ", ".join(f"{count} × {name}" for name, count in sorted(names.items())) or "none"
    return {"GPUs:": told, "the driver": facts["gpus"]["driver"] or "none"}


def _name(nodes: Nodes, rank: int) -> str:
    return f"node {rank} ({nodes[rank][0]})"
