"""`polycom convert` asks for no more packages than the forms that it reads and writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from polycom_ext import cli

HELP = """
import sys
for package in ("torch", "tokenizers", "safetensors", "transformers"):
    sys.modules[package] = None
from polycom_ext import cli
cli.main(["convert", "--help"])
"""


def test_what_it_can_do_is_told_without_the_packages_of_any_form() -> None:
    said = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    listed = " ".join(said.stdout.split()).partition("the form to write: ")[2].partition(" --")[0]
    assert set(listed.split(", ")) == {"megatron", "megatron-torch", "olmo", "hf"}, said


@pytest.mark.parametrize("named", [b"", b"\xff", "²".encode(), b"-1", b"release", b"7", b"../up"])
def test_a_tracker_that_names_nothing_is_refused_in_a_sentence(
    named: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "latest_checkpointed_iteration.txt").write_bytes(named)
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--to", "hf"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("polycom convert: ")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()
