"""A form of token files is found by its name, that of another package too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from polycom_ext import trainers
from polycom_ext.cli import main

from .conftest import read_documents, write_jsonl

THIRD_PARTY = Path(__file__).parents[1] / "runs" / "third_party"


def test_another_packages_form_is_written_like_ours(
    prepare: Callable[..., tuple[int, str]],
    texts: Sequence[str],
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(THIRD_PARTY)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    for name in ("megatron", "toy"):
        arguments = (source, "--tokenizer", tokenizer, "--format", name, "--output", tmp_path / name)
        status, output = prepare(*arguments)
        assert status == 0, output
    assert f"{tmp_path / 'toy.tokens'}: 60 documents" in output
    assert output.count("uint32") == 1
    lines = (tmp_path / "toy.tokens").read_text().splitlines()
    assert [[int(id_) for id_ in line.split()] for line in lines] == read_documents(tmp_path / "megatron")

    with pytest.raises(SystemExit):
        main(["data", "prepare", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "PREFIX.bin and .idx (default); olmo: flat" in said
    assert "toy: a document a line, PREFIX.tokens" in said


def test_one_that_cannot_be_imported_is_named_when_it_is_asked_for(
    prepare: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "broken-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[{trainers.FORMAT_GROUP}]\nbroken = no_such_module:FORM\n")
    monkeypatch.syspath_prepend(tmp_path)
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    arguments = (source, "--train-tokenizer", 300, "--output", tmp_path / "made")
    status, output = prepare(*arguments, "--format", "broken")
    assert (status, output) == (
        2,
        "polycom data: token format 'broken' cannot be imported from no_such_module:FORM: "
        "No module named 'no_such_module'\n",
    )
    assert prepare(*arguments)[0] == 0
