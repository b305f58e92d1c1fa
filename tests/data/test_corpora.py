"""The Shakespeare corpus: the whole of it, nothing else, and a validation text that training has not seen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from polycom_ext.cli import main
from polycom_ext.data.corpora import corpus, work
from polycom_ext.errors import PolycomError

Document = dict[str, str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "new"
    assert main(["data", "corpus", "shakespeare", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def split(folder: Path) -> dict[str, list[Document]]:
    lines = {name: (folder / f"{name}.jsonl").read_text().splitlines() for name in ("train", "valid")}
    return {name: [json.loads(line) for line in part] for name, part in lines.items()}


def eight_grams(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """Runs of eight words, in a spelling that the editions of 1623 and today have in common."""
    grams: set[tuple[str, ...]] = set()
    for text in texts:
        plain = re.sub(r"[^a-z ]", "", re.sub(r"\s+", " ", text.lower()))
        words = [word.replace("v", "u").replace("j", "i").rstrip("e") for word in plain.split()]
        grams.update(zip(*(words[shift:] for shift in range(8)), strict=False))
    return grams


def test_all_texts_are_there_and_only_they(split: dict[str, list[Document]]) -> None:
    documents = [*split["train"], *split["valid"]]
    assert len({document["source"] for document in documents}) == len(documents) == 77
    assert sum(len(document["text"]) for document in documents) > 9_500_000
    for document in documents:
        licence = re.search(r"gutenberg|public domain|copyright|\be-?text\b", document["text"], re.IGNORECASE)
        assert licence is None, document["source"]
        assert document["text"] == document["text"].strip() + "\n"


def test_five_to_eight_percent_are_held_out_as_whole_works(split: dict[str, list[Document]]) -> None:
    sizes = {name: sum(len(document["text"]) for document in part) for name, part in split.items()}
    assert 0.05 < sizes["valid"] / sum(sizes.values()) < 0.08
    works = {name: {work(document["source"]) for document in part} for name, part in split.items()}
    assert works["valid"] == {"john", "macbeth", "tempest"}
    assert not works["train"] & works["valid"]
    assert len(works["train"] | works["valid"]) == 42, "37 plays and 5 poems: editions are paired"


def test_no_edition_of_a_held_out_work_is_trained_on(split: dict[str, list[Document]]) -> None:
    def shared(held_out: list[Document], rest: list[Document]) -> float:
        grams = eight_grams(document["text"] for document in held_out)
        return len(grams & eight_grams(document["text"] for document in rest)) / len(grams)

    folio = [document for document in split["valid"] if document["source"].endswith("_f")]
    modern = [document for document in split["valid"] if not document["source"].endswith("_f")]
    assert shared(modern, folio) > 0.1, "what a leak looks like"
    assert shared(split["valid"], split["train"]) < 0.001


def test_spellings_are_mixed(split: dict[str, list[Document]]) -> None:
    folio = [document["source"].endswith("_f") for document in split["train"]]
    for first in range(0, len(folio) - 20, 10):
        assert 0.2 < sum(folio[first : first + 20]) / 20 < 0.8


def test_again_changes_nothing_and_other_files_stay(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    corpus("shakespeare", folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(PolycomError, match="no corpus milton; choose one of shakespeare"):
        corpus("milton", folder)


def test_a_file_of_that_name_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").write_text("mine")
    with pytest.raises(PolycomError, match="holds something else"):
        corpus("shakespeare", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["valid.jsonl"]
