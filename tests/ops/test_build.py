"""Building where the toolkit is old or another, and what a user is told of a build that failed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from polycom_ext.ops import build
from polycom_ext.ops.polynomial import library

ROOT = Path(__file__).parents[2]
OLD_NVCC = """#!/bin/sh
case $1 in
  --version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
  --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_86\\nsm_90\\n' ;;
  *) echo "nvcc fatal   : Unsupported gpu architecture 'compute_100'"; exit 1 ;;
esac
"""


@pytest.fixture
def old_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stand-in for a toolkit from before sm_100, in $CUDA_HOME."""
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(OLD_NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1]))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build.find_nvcc() == str(nvcc)
    return str(nvcc)


def test_architectures_are_those_that_nvcc_knows(old_nvcc: str) -> None:
    assert build.cuda_targets(old_nvcc) == (["80", "90"], "90")


@pytest.mark.parametrize(
    ("asked", "targets"),
    [
        ("8.0;9.0+PTX", (["80", "90"], "90")),
        ("8.0 8.6", (["80", "86"], None)),
        ("8.0, 9.0a", (["80", "90a"], None)),
    ],
)
def test_torch_cuda_arch_list_decides(
    old_nvcc: str, monkeypatch: pytest.MonkeyPatch, asked: str, targets: tuple[list[str], str | None]
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert build.cuda_targets(old_nvcc) == targets


@pytest.mark.parametrize(
    ("asked", "said"),
    [("8.0 10.0", "names 10.0, which .* does not know"), ("Hopper", "'Hopper'"), ("7.5", "need 8.0")],
)
def test_architectures_that_cannot_be_are_named(
    old_nvcc: str, monkeypatch: pytest.MonkeyPatch, asked: str, said: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(build.BuildError, match=said):
        build.cuda_targets(old_nvcc)


def test_a_cuda_library_says_what_it_was_built_from_and_for() -> None:
    sources = build.FAMILIES["polynomial"] / "csrc"
    stamp = build.cuda_stamp(sources, ["80", "90a"], "90")
    assert stamp == f"{build.sources_digest(sources)}:sm_80:sm_90a:compute_90"
    assert build.cuda_stamp(sources, ["80"]).split(":")[1:] == ["sm_80"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, which is not on PATH")
def test_the_nvcc_at_hand_compiles_for_every_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build.cuda_targets(build.find_nvcc()) == (["80", "90", "100"], "100")


def test_a_toolkit_of_another_major_version_than_torchs_is_named(old_nvcc: str) -> None:
    with pytest.raises(build.BuildError, match=r"is of CUDA 12\.4 but torch of CUDA 13\.0; set CUDA_HOME"):
        build.check_nvcc(old_nvcc, build.Torch(Path(), "13.0"))
    build.check_nvcc(old_nvcc, build.Torch(Path(), "12.8"))
    build.check_nvcc(old_nvcc, build.Torch(Path(), None))


def _install(directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What pip makes setup.py do, here without a compiler that works."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(directory)]
    command += ["--build-temp", str(directory / "temp")]
    environment = os.environ | {"CXX": "false"} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_first_use_says_why_the_build_failed(tmp_path: Path) -> None:
    """pip hides the output of a build that ends well, and this one does: the package works without."""
    assert _install(tmp_path).returncode == 0
    devices, problem = library._load(tmp_path / "polycom_ext" / "ops" / "polynomial")
    assert not devices
    note = tmp_path / "polycom_ext" / "ops" / "polynomial" / "_cpu.failed.txt"
    assert f"are installed (false failed: exit status 1; all of it in {note}); build it with" in problem


@pytest.mark.parametrize("version", ["2.6.0+cu124", "2.10.1"])
def test_an_older_torch_is_told_what_the_operations_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """Of a wheel, whose library it cannot load, and of its own build, which there is none of."""
    monkeypatch.setattr(torch, "__version__", version)
    said = f"they need torch 2.11 or later, and this is {version}"
    (tmp_path / "_cpu.so").write_text("no library")
    assert library._load(tmp_path)[1].endswith(f"; {said}")
    (tmp_path / "_cpu.so").unlink()
    assert library._load(tmp_path)[1] == f"no compiled operations are installed; {said}"
    with pytest.raises(build.BuildError, match=re.escape(said)):
        build.Torch.find()


@pytest.mark.parametrize("version", ["2.11.0a0+x.nv26.02", "2.11a0", "2.11.0", "3.0.0"])
def test_an_alpha_counts_as_its_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert library._load(tmp_path)[1].endswith("; build it with `pip install . --no-build-isolation`")
    build.Torch.find()


def test_cuda_operations_beside_a_torch_without_cuda_are_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    (tmp_path / "_cuda.so").write_text("no library")
    said = f"torch {torch.__version__} is built without CUDA; _cuda.so needs one that has it"
    assert library._load_cuda(tmp_path / "_cuda.so") == said


def test_cuda_operations_that_were_demanded_are_not_left_out_where_pip_hides_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError\n")
    result = _install(tmp_path / "lib", POLYCOM_BUILD_CUDA="1", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert (
        "POLYCOM_BUILD_CUDA is set, but torch is not installed in the building environment" in result.stderr
    )


def test_a_build_of_the_cuda_operations_that_was_demanded_must_succeed(tmp_path: Path, old_nvcc: str) -> None:
    result = _install(tmp_path, POLYCOM_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="10.0")
    assert result.returncode == 1
    assert "POLYCOM_BUILD_CUDA is set, but TORCH_CUDA_ARCH_LIST names 10.0" in result.stderr
