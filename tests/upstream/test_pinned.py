"""The pinned upstreams themselves."""

import shutil
import subprocess
from pathlib import Path

import pytest

from polycom_ext import cli, upstream
from polycom_ext.upstream import checkout, fetch, maintain, pins, trees
from polycom_ext.upstream.pins import Git
from polycom_ext.upstream.series import read_series

from .conftest import git
from .test_trees import content


def reachable(url: str) -> bool:
    finished = subprocess.run(
        ["git", "ls-remote", "--exit-code", url, "HEAD"], capture_output=True, timeout=60
    )
    return finished.returncode == 0


def test_megatron_verifies() -> None:
    assert maintain.verify(pins.get("megatron")) == []


def test_the_megatron_series_is_small() -> None:
    changed = 0
    for patch in read_series(pins.get("megatron").series):
        for line in patch.path.read_text().partition("\ndiff --git")[2].splitlines():
            changed += line.startswith(("+", "-")) and not line.startswith(("+++", "---"))
    assert 0 < changed < 140


def test_one_changed_byte_in_any_patched_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = upstream.ensure_applied("megatron")
    shutil.copytree(source, tmp_path / "megatron")
    monkeypatch.setenv("POLYCOM_UPSTREAM_DIR", str(tmp_path))
    pin = pins.get("megatron")
    trees.unapply(pin)
    files = sorted({change.path for patch in read_series(pin.series) for change in patch.changes})
    assert len(files) > 3
    for name in files:
        path = tmp_path / "megatron" / name
        original = path.read_bytes()
        damaged = bytes([original[0] ^ 1]) + original[1:]
        path.write_bytes(damaged)
        assert cli.main(["upstream", "apply", "megatron"]) == 2
        assert name in capsys.readouterr().err
        assert path.read_bytes() == damaged
        path.write_bytes(original)
    assert trees.status(pin).state is trees.State.PRISTINE


@pytest.mark.github
@pytest.mark.parametrize("name", [pin.name for pin in pins.load().values() if isinstance(pin.source, Git)])
def test_pins_from_git_verify(name: str) -> None:
    pin = pins.get(name)
    assert isinstance(pin.source, Git)
    if not reachable(pin.source.url):
        pytest.skip(f"{pin.source.url} cannot be reached: git is the only source of {name}")
    if pin.series is not None and not pin.series.exists():
        pytest.fail(f"{name} has no series yet")
    assert maintain.verify(pin) == []
    assert fetch.first_message(fetch.fetch(pin)).startswith(name)


@pytest.mark.full
@pytest.mark.github
@pytest.mark.parametrize(("name", "ref"), [("olmo", "v0.6.0"), ("olmo-moe", "")])
def test_a_clone_of_olmo_is_patched_and_given_back(tmp_path: Path, name: str, ref: str) -> None:
    """Without its evaluation data, which is most of it."""
    pin, source = pins.get(name), pins.get("olmo-moe").source
    assert isinstance(source, Git)
    if not reachable(source.url):
        pytest.skip(f"{source.url} cannot be reached: a whole OLMo is on GitHub only")
    clone = tmp_path / "OLMo"
    git(tmp_path, "clone", "--quiet", "--filter=blob:none", "--sparse", "--no-checkout", source.url, "OLMo")
    git(clone, "sparse-checkout", "set", "olmo", "scripts")
    git(clone, "checkout", "--quiet", ref or source.commit)
    before = content(clone)
    for branch in (None, "polycom"):
        assert checkout.apply(pin, clone, branch).state is trees.State.APPLIED
        patched = {change.path for patch in read_series(pin.series) for change in patch.changes}
        assert {path for path, text in content(clone).items() if text != before[path]} == patched
        assert checkout.verify(pin, clone) == []
        assert checkout.unapply(pin, clone).state is trees.State.PRISTINE
        assert content(clone) == before
