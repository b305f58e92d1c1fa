"""The paths that the public functions take, and disks of any size."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from polycom_ext.ops.polynomial import library

# Started in the background (`nohup`, a script's `&`) the tests, and all that they start, would ignore these.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

GPU = ["cuda"] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *GPU, "eager"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The fused operations of each device, and plain torch's; new tensors are on that device."""
    name = str(request.param)
    if name == "eager":
        monkeypatch.setattr(library, "devices", frozenset())
        monkeypatch.setattr(library, "problem", "")
    elif name not in library.devices:
        pytest.skip(f"the fused operations are not there: {library.problem}")
    with torch.device("cuda" if name == "cuda" else "cpu"):
        yield name


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of that size, such as `2m`."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(size: str) -> Path:
        command: list[str | Path] = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
        return path

    yield mount
    if path.is_mount():
        subprocess.run(["umount", "--lazy", path], check=True)
