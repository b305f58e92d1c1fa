"""`polycom convert` asks for no more packages than the forms that it reads and writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from polycom_ext import cli, trainers
from polycom_ext.checkpoints.command import convert
from polycom_ext.checkpoints.forms import Options, Writes

from ..integrations.megatron.test_written import made

WRITTEN = [name for name, form in trainers.checkpoint_forms().items() if isinstance(form, Writes)]
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


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize(
    ("words", "said"),
    [(97, "gives the token 96, and the vocabulary of the model is 96"), (0, "is not a tok")],
)
def test_a_tokenizer_of_another_model_is_refused_by_every_form(
    form: str, words: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target, file = tmp_path / "source", tmp_path / "target", tmp_path / "words.json"
    convert(made("polynorm"), source, "megatron", Options())
    file.write_text("{}")
    if words:
        Tokenizer(models.WordLevel({f"w{n}": n for n in range(words)}, "w0")).save(str(file))
    assert cli.main(["convert", str(source), str(target), "--to", form, "--tokenizer", str(file)]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not target.exists()


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


@pytest.mark.parametrize("form", WRITTEN)
def test_weights_of_other_bytes_than_were_converted_are_refused(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    convert(made("polynorm"), source, form, Options())
    weights = max(
        (path for path in source.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    content = bytearray(weights.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 1
    weights.write_bytes(content)
    inside = source / weights.relative_to(source).parts[0]
    for named in (source, *([inside] if inside.is_dir() else [])):
        assert cli.main(["convert", str(named), str(tmp_path / "out"), "--to", "hf"]) == 2
        assert f"{weights} is not what was converted (other bytes)" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_settings_of_a_converted_checkpoint_may_be_changed_and_its_manifest_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    convert(made("polynorm"), source, "hf", Options())
    for name in ("config.json", "generation_config.json"):
        with (source / name).open("a") as file:
            file.write("\n")
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--to", "hf"]) == 0
    for damaged in ("{}", "[1]", '{"sha256": 3}', '{"sha256": ', '{"sha256": {"gone.safetensors": "0"}}'):
        (source / "conversion.json").write_text(damaged)
        assert cli.main(["convert", str(source), str(tmp_path / "again"), "--to", "hf"]) == 2
        assert "conversion.json" in capsys.readouterr().err
