"""Machines that are not there: an nvidia-smi on PATH, packages on PYTHONPATH, and the facts as data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from polycom_ext.machine.look import (
    PACKAGES,
    Clock,
    Compiler,
    Device,
    Folder,
    Machine,
    Operations,
    Package,
    Torch,
)
from polycom_ext.machine.nvidia import Driver, Gpu

SMI = '''#!{python} -ISE
"""Answers as nvidia-smi does: rows of the fields asked for, or the first one that it does not know."""
import re, sys

TABLES, STATUS, SAYS, STREAM = {tables!r}, {status!r}, {says!r}, sys.{stream}
if SAYS is not None:
    STREAM.buffer.write(SAYS.encode("utf-8", "surrogateescape"))
    sys.exit(STATUS)
what, fields = re.fullmatch("--query-([a-z-]+)=(.+)", sys.argv[1]).groups()
assert sys.argv[2:] == ["--format=csv,noheader,nounits"], sys.argv
rows = TABLES.get(what, [])
for field in fields.split(","):
    if rows and not isinstance(rows[0], str) and field not in rows[0]:
        print(f'Field "{{field}}" is not a valid field to query.\\n', file=STREAM)
        sys.exit(2)
for row in rows:
    print(row if isinstance(row, str) else ", ".join(row[field] for field in fields.split(",")))
sys.exit(STATUS)
'''

H100 = {
    "index": "0",
    "uuid": "GPU-11111111-2222-3333-4444-555555555555",
    "name": "NVIDIA H100 80GB HBM3",
    "compute_cap": "9.0",
    "driver_version": "580.95.05",
    "memory.total": "81559",
    "memory.used": "4",
    "temperature.gpu": "34",
    "clocks.sm": "345",
    "clocks.max.sm": "1980",
    "mig.mode.current": "Disabled",
    "ecc.mode.current": "Enabled",
    "ecc.errors.uncorrected.volatile.total": "0",
    "retired_pages.pending": "[N/A]",
    "gpu_recovery_action": "None",
    "clocks_event_reasons.active": "0x0000000000000001",
    "clocks_throttle_reasons.active": "0x0000000000000001",
}
"""A healthy, idle one, as its driver tells it."""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put an nvidia-smi on PATH that knows these tables (`--query-gpu` and so on), or says something else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def write(
        tables: dict[str, list[dict[str, str] | str]],
        status: int = 0,
        says: str | None = None,
        stream: str = "stdout",
    ) -> None:
        path = folder / "nvidia-smi"
        path.write_text(
            SMI.format(python=sys.executable, tables=tables, status=status, says=says, stream=stream)
        )
        path.chmod(0o755)

    return write


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install a package for the processes that are started: its files, and its metadata if it has any."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)

    def write(files: dict[str, str], name: str = "", version: str = "", summary: str = "") -> Path:
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        if name:
            about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
            about.mkdir()
            text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n"
            (about / "METADATA").write_text(text)
            (about / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        return folder

    return write


GPU = Gpu(0, H100["uuid"], H100["name"], "9.0", 81559, 4, 34, 345, 1980, False, False, True, 0, (), (), ())
CHECKED = {"polynorm": "fused", "polyprelu": "plain"}
MACHINE = Machine(
    python="3.11.7",
    executable="/venv/bin/python",
    system="Linux 6.8, x86_64",
    package="0.1.0",
    package_path="/site/polycom_ext",
    visible_devices=None,
    driver=Driver("580.95.05", (GPU,)),
    torch=Torch("2.14.1", "13.0", "/site/torch", "2.28.3", (Device(GPU.name, "9.0", GPU.uuid, 1 << 36),)),
    operations=Operations(
        ("cpu", "cuda"), "", "avx512", ("sm_90", "compute_90"), ("",), {"cpu": CHECKED, "cuda:0": CHECKED}
    ),
    nvcc=Compiler("/usr/local/cuda/bin/nvcc", "13.0"),
    packages=tuple(Package(module, f"/site/{module}", "2.20.2", imported=True) for module in PACKAGES),
    folders=(Folder("runs", "/data/outputs", 1 << 40, True),),
    clock=Clock(1.8e9, 1.79e9, True),
)
"""One where nothing is wrong: a node with a GPU."""
NO_GPU = Machine(
    **{
        **vars(MACHINE),
        "driver": Driver(None),
        "torch": Torch("2.13.0+cpu", path="/site/torch"),
        "operations": Operations(("cpu",), "no nvcc", "avx2", checked={"cpu": CHECKED}),
        "packages": tuple(Package(module) for module in PACKAGES),
    }
)
"""One where nothing is wrong: a laptop."""
