"""The wheel, installed away from any checkout, does what a checkout does and leaves its torch alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.full
TOP = Path(__file__).parents[1]
CONTAINERS_TORCH = "2.11.0a0+x.nv26.02"
"""How NVIDIA's containers version theirs: an alpha, older than 2.11 to pip."""


def run(command: list[str | Path], folder: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(
        command, cwd=folder, env={**kept, **environment}, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what is committed or could be, with the CPU operations."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], TOP)
    for name in filter(None, listed.split("\0")):
        if (TOP / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TOP / name, folder / "source" / name)
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
    ]
    run([*pip, folder / "source"], folder, POLYCOM_BUILD_CUDA="0")
    [made] = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, beside a torch of a container's version.

    The packages that it needs are links to those that run the tests; the package itself is not among them.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False)
    packages = folder / "packages"
    packages.mkdir()
    theirs = [Path(path) for path in sys.path if path.endswith("site-packages")]
    for package in (package for path in theirs for package in path.iterdir()):
        link = packages / package.name
        ours = package.name.startswith(("polycom", "__editable__", "torch-")) or package.name == "torch"
        if not ours and not link.is_symlink():
            link.symlink_to(package)
    _container_torch(packages)
    python = folder / "venv" / "bin" / "python"
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    (Path(site) / "packages.pth").write_text(f"{packages}\n")
    before = _contents(packages)
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    said = run([*pip, "install", f"{wheel}[megatron,data,report]"], folder)
    assert "Successfully installed polycom-ext" in said
    assert said.count("Successfully installed") == 1
    assert _contents(packages) == before
    return folder / "venv"


def _container_torch(packages: Path) -> None:
    import torch

    ours = Path(torch.__file__).parent
    (packages / "torch").mkdir()
    for part in ours.iterdir():
        if part.name not in ("version.py", "__pycache__"):
            (packages / "torch" / part.name).symlink_to(part)
    version = (ours / "version.py").read_text().replace(torch.__version__, CONTAINERS_TORCH)
    (packages / "torch" / "version.py").write_text(version)
    about = packages / f"torch-{CONTAINERS_TORCH}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {CONTAINERS_TORCH}\n")
    (about / "INSTALLER").write_text("a container\n")


def _contents(packages: Path) -> dict[str, str]:
    return {
        str(path.relative_to(packages)): os.readlink(path) if path.is_symlink() else "a file"
        for path in packages.rglob("*")
        if "__pycache__" not in path.parts
    }


def test_what_users_need_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    for folder in ("patches", "configs", "launch", "docker"):
        there = {str(path.relative_to(TOP)) for path in (TOP / folder).rglob("*") if path.is_file()}
        assert {f"polycom_ext/{name}" for name in there} <= names
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert "polycom_ext/ops/polynomial/_cpu.so" in names
    assert not [name for name in names if name.startswith(("tests", "build"))]


def test_a_container_s_torch_is_left_alone_and_runs_the_fused_operations(environment: Path) -> None:
    script = (
        "import torch, polycom_ext; polycom_ext.PolyNorm()(torch.randn(4, 64)).sum();"
        "from polycom_ext.ops.polynomial import library;"
        "print(torch.__version__, sorted(library.devices), polycom_ext.__file__)"
    )
    said = run([environment / "bin" / "python", "-c", script], environment).split()
    assert said[:2] == [CONTAINERS_TORCH, "['cpu']"]
    assert said[2].startswith(str(environment))


def test_an_installed_polycom_does_what_a_checkout_does(environment: Path, tmp_path: Path) -> None:
    polycom = environment / "bin" / "polycom"
    home = {"XDG_DATA_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n\n" * 4000)
    made: list[str | Path] = [polycom, "data", "prepare", "text.txt", "--output"]
    run([*made, "build/demo/train", "--train-tokenizer", "300"], tmp_path, **home)
    run([*made, "build/demo/valid", "--tokenizer", "build/demo/train.tokenizer.json"], tmp_path, **home)
    run([polycom, "upstream", "apply", "megatron"], tmp_path, **home)
    assert (tmp_path / "home" / "polycom" / "upstream" / "megatron" / "megatron" / "core").is_dir()
    short = ["train-iters=4", "eval-iters=1", "eval-interval=4", "lr-warmup-iters=1", "lr-decay-iters=4"]
    sets = [part for one in short for part in ("--set", f"megatron.{one}")]
    said = run(
        [polycom, "run", "configs/tiny/dense.yaml", "--set", "activation=polynorm", *sets], tmp_path, **home
    )
    assert "finished in" in said
    run([polycom, "report", "outputs/tiny-dense-polynorm", "--output", "report"], tmp_path, **home)
    assert "PolyNorm" in (tmp_path / "report" / "index.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"build", "home", "outputs", "report", "text.txt"}
