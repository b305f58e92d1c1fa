"""The facts: what this machine has. Nothing is judged, and nothing imported that is heavy or may crash."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polycom_ext
from polycom_ext._version import __version__
from polycom_ext.errors import PolycomError
from polycom_ext.machine import nvidia, probe
from polycom_ext.ops import build
from polycom_ext.upstream import download

PACKAGES = {
    "transformer_engine.pytorch": "transformer-engine",
    "apex": "apex (NVIDIA's)",
    "flash_attn": "flash-attn",
    "grouped_gemm": "grouped_gemm",
}
"""What trainers use where it is installed: module -> how people call it."""
SHARED_MEMORY = Path("/dev/shm")
"""Where ranks of one node, and workers that load data, exchange what they have."""
RUNS, SHARED = "runs", "shared memory"
"""Purposes of a folder."""


@dataclass(frozen=True)
class Device:
    """A GPU as torch numbers it."""

    name: str
    capability: str
    uuid: str
    memory: int
    """In bytes."""


@dataclass(frozen=True)
class Torch:
    """The installed torch."""

    version: str | None = None
    cuda: str | None = None
    """The CUDA that it was built with; None for a build without."""
    path: str = ""
    nccl: str | None = None
    devices: tuple[Device, ...] = ()
    cuda_problem: str = ""
    """Why it has no GPU, of a build with CUDA."""
    problem: str = ""
    """Why it cannot be imported."""


@dataclass(frozen=True)
class Operations:
    """Our fused operations, as they are loaded here."""

    fused_on: tuple[str, ...] = ()
    fused_problem: str = ""
    """Why not on both CPU and CUDA."""
    instruction_set: str | None = None
    architectures: tuple[str, ...] = ()
    gpu_problems: tuple[str, ...] = ()
    """For each of torch's GPUs why they do not run there, or nothing."""
    checked: dict[str, dict[str, str]] = field(default_factory=dict)
    """Device -> activation -> `fused`, `plain`, or how it differs from its definition."""
    problem: str = ""
    """Why this could not be found out."""


@dataclass(frozen=True)
class Package:
    """One of PACKAGES."""

    module: str
    path: str = ""
    """Where it is; nothing where it is not installed."""
    version: str | None = None
    features: tuple[str, ...] = ()
    foreign: str = ""
    """What another project of the same name calls itself."""
    problem: str = ""
    """Why it cannot be imported."""
    imported: bool = False


@dataclass(frozen=True)
class Compiler:
    """nvcc; None where there is none."""

    path: str | None
    release: str | None = None
    problem: str = ""


@dataclass(frozen=True)
class Folder:
    """A place that is written to."""

    purpose: str
    path: str
    free: int
    """Bytes."""
    writable: bool
    problem: str = ""
    """Why there is none, and the way out."""


@dataclass(frozen=True)
class Clock:
    """The system's clock."""

    now: float
    newest_file: float
    """When the newest file of this package was written, which cannot be in the future."""
    synchronised: bool | None
    """What the kernel says; None where it does not."""


@dataclass(frozen=True)
class Machine:
    """All that `look` found."""

    python: str
    executable: str
    system: str
    package: str
    """Version of this package."""
    package_path: str
    visible_devices: str | None
    """$CUDA_VISIBLE_DEVICES"""
    driver: nvidia.Driver
    torch: Torch
    operations: Operations
    nvcc: Compiler
    packages: tuple[Package, ...]
    folders: tuple[Folder, ...]
    clock: Clock

    @property
    def has_gpus(self) -> bool:
        """Whether there is a GPU, usable or not."""
        return bool(self.driver.gpus or self.driver.problem or self.torch.devices)


def look(runs: Path, modules: Iterable[str] = ()) -> Machine:
    """Find out; `runs` is where run directories are to be, `modules` are wanted beside PACKAGES."""
    driver = nvidia.look()  # before anything of ours is on a GPU
    torch, operations = _torch()
    home = Path(polycom_ext.__file__).parent
    return Machine(
        python=platform.python_version(),
        executable=sys.executable,
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        package=__version__,
        package_path=str(home),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        driver=driver,
        torch=torch,
        operations=operations,
        nvcc=_nvcc(torch),
        packages=tuple(package(module) for module in dict.fromkeys([*PACKAGES, *modules])),
        folders=tuple(_folders(runs)),
        clock=clock(home),
    )


def _torch() -> tuple[Torch, Operations]:
    found, problem = probe.ask("torch")
    imported = "version" in found
    devices = tuple(Device(**one) for one in found.pop("devices", ()))
    torch = Torch(devices=devices, problem="" if imported else problem, **_of(Torch, found))
    return torch, Operations(problem=problem if imported else "", **_of(Operations, found))


def package(module: str) -> Package:
    """One of PACKAGES, or another module."""
    found, problem = probe.ask(module)
    return Package(module=module, problem=problem, **_of(Package, found))


def _of(kind: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Those of the things found that are fields of a class, lists as tuples."""
    known = {name: found[name] for name in kind.__dataclass_fields__ if name in found}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}


def _nvcc(torch: Torch) -> Compiler:
    try:
        path = build.find_nvcc()
    except build.BuildError:
        return Compiler(None)
    release = None
    try:
        told = re.search(r"release (\d+\.\d+)", build.run([path, "--version"]))
        release = told[1] if told else None
        build.check_nvcc(path, build.Torch(Path(torch.path), torch.cuda))
    except build.BuildError as error:
        return Compiler(path, release, error.sentence)
    return Compiler(path, release)


def _folders(runs: Path) -> Iterator[Folder]:
    yield folder(RUNS, runs.absolute())
    try:
        yield folder("cache", download.cache_dir().absolute())
    except (PolycomError, OSError) as error:  # without a home: none that is this user's, or no place for one
        yield Folder("cache", "", 0, False, str(error))
    try:
        yield folder("temporary files", Path(tempfile.gettempdir()).absolute())
    except OSError:
        problem = "there is no place for them that can be written; set TMPDIR to one"
        yield Folder("temporary files", "", 0, False, problem)
    if SHARED_MEMORY.exists():
        yield folder(SHARED, SHARED_MEMORY)


def folder(purpose: str, path: Path) -> Folder:
    """A place, which may not be made yet: then what is there of the way to it."""
    there = next(above for above in (path, *path.parents) if os.path.exists(above))
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return Folder(purpose, str(path), shutil.disk_usage(there).free, writable)


_TIMEX = 512
"""Bytes, more than struct timex of adjtimex(2) has; all zero it asks, and sets nothing."""
_TIME_ERROR = 5
"""What adjtimex returns while nothing keeps the clock right."""


def clock(package_path: Path) -> Clock:
    """The system's clock, beside the files of a package."""
    newest = max((path.stat().st_mtime for path in package_path.rglob("*.py")), default=0.0)
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX))
    except (OSError, AttributeError):
        state = -1
    return Clock(time.time(), newest, None if state < 0 else state != _TIME_ERROR)
