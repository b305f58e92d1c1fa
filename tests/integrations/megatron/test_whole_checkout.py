"""Megatron-LM whole, of which the wheel is a part: patched in place, and run by its own pretrain_gpt.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from polycom_ext import cli
from polycom_ext.upstream import pins
from polycom_ext.upstream.series import read_series

from .conftest import CPU_OPTIONS, ENVIRONMENT, TINY, Trainer

pytestmark = [pytest.mark.github, pytest.mark.full]

URL, TAG = "https://github.com/NVIDIA/Megatron-LM", "core_v0.17.1"
PATCHED = "megatron/core/transformer/mlp.py"


def git(tree: Path, *arguments: str) -> str:
    command = ["git", "-C", str(tree), "-c", "user.name=T", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone at the tag, with a commit, an edit and a file of the user's."""
    folder = tmp_path_factory.mktemp("own") / "Megatron-LM"
    command = ["git", "clone", "--quiet", "--depth", "1", "--branch", TAG, URL, str(folder)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if told.returncode != 0:
        pytest.skip(f"Megatron-LM whole is on GitHub only: {told.stderr.strip().splitlines()[-1]}")
    assert TAG in pins.get("megatron").origin
    (folder / "README.md").write_text("mine\n")
    git(folder, "commit", "--quiet", "--all", "-m", "Mine")
    (folder / "pretrain_t5.py").write_text("edited\n")
    (folder / "tools" / "mine.py").touch()
    return folder


def polycom(verb: str, tree: Path, *more: str) -> int:
    return cli.main(["upstream", verb, "megatron", "--tree", str(tree), *more])


def losses(tree: Path, *options: str) -> list[float]:
    """What its own pretrain_gpt.py logs, in a rehearsal."""
    entry = ["-m", "polycom_ext.integrations.megatron.rehearsal", "pretrain_gpt.py"]
    told = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            *entry,
            *CPU_OPTIONS,
            *TINY,
            *options,
        ],
        cwd=tree,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert told.returncode == 0, told.stderr[-4000:]
    return [float(loss) for loss in re.findall(r"lm loss: (\S+)", told.stdout)]


def test_it_is_patched_in_place_trains_by_its_own_script_and_is_given_back(
    whole: Path, train: Trainer, capfd: pytest.CaptureFixture[str]
) -> None:
    """Step for step what our entry does on the wheel's tree."""
    before = git(whole, "status", "--porcelain")
    assert polycom("apply", whole) == polycom("status", whole) == polycom("verify", whole) == 0
    series = {change.path for patch in read_series(pins.get("megatron").series) for change in patch.changes}
    assert set(git(whole, "diff", "--name-only").split()) == {*series, "pretrain_t5.py"}
    options = ("--polycom-activation", "polynorm", "--train-iters", "4")
    expected = train(*options, iterations=4).series("train/loss")
    found = losses(whole, *options)
    assert len(found) == 4
    assert found[-1] == pytest.approx(expected[4], rel=1e-5)
    assert found[-1] < found[0]
    assert polycom("unapply", whole) == 0
    assert git(whole, "status", "--porcelain") == before
    (whole / PATCHED).write_bytes((whole / PATCHED).read_bytes() + b"\n")
    edited = git(whole, "diff")
    capfd.readouterr()
    assert polycom("apply", whole) == 2
    assert f"these files are not as megatron 0.17.1 has them: {PATCHED}. " in capfd.readouterr().err
    assert git(whole, "diff") == edited
    git(whole, "checkout", "--quiet", PATCHED)


def test_it_is_patched_on_a_branch(whole: Path) -> None:
    mine, before = git(whole, "rev-parse", "HEAD"), git(whole, "status", "--porcelain")
    assert polycom("apply", whole, "--branch", "polycom") == 0
    patches = len(read_series(pins.get("megatron").series))
    assert git(whole, "log", "--format=%an", f"-{patches + 1}").split() == ["PolyCom"] * patches + ["T"]
    assert git(whole, "status", "--porcelain") == before
    assert polycom("unapply", whole) == 0
    assert (git(whole, "rev-parse", "HEAD"), git(whole, "status", "--porcelain")) == (mine, before)
