"""`polycom analyze`: numbers and figures of checkpoints, and what becomes of what cannot be studied."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from PIL import Image

from polycom_ext.analysis.spectrum import effective_rank
from polycom_ext.checkpoints.constants import described
from polycom_ext.cli import main
from polycom_ext.runs.record import Record

from ..integrations.huggingface.conftest import KINDS, PLAIN, made


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Token files in OLMo's form."""
    path = tmp_path / "text.npy"
    generator = np.random.default_rng(0)
    generator.integers(0, PLAIN["vocab_size"], 400, dtype=np.uint16).tofile(path)
    return path


def test_every_weight_and_coefficient_stands_in_the_tables(tmp_path: Path) -> None:
    kinds = ("polynorm", "gated-experts")
    models = {kind: made(kind) for kind in kinds}
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
    folders = [str(tmp_path / kind) for kind in kinds]
    assert main(["analyze", *folders, "--output", str(tmp_path / "out")]) == 0
    found = rows(tmp_path / "out" / "effective-rank.csv")
    assert len(found) == 2 * 2 + 2 * 3 * 4
    [one] = [
        row
        for row in found
        if (row["checkpoint"], row["layer"], row["weight"], row["expert"])
        == ("gated-experts", "1", "gate", "2")
    ]
    weight = models["gated-experts"].model.layers[1].mlp.experts.gate_proj[2]
    assert float(one["effective_rank"]) == pytest.approx(float(effective_rank(weight.detach())))
    assert one["full_rank"] == "32"
    coefficients = rows(tmp_path / "out" / "coefficients.csv")
    assert [row["coefficient"] for row in coefficients] == ["a₀", "a₁", "a₂", "a₃"] * 2
    act = models["polynorm"].model.layers[0].mlp.act_fn
    assert [float(row["value"]) for row in coefficients[:2]] == pytest.approx(
        [float(act.bias.detach()), float(act.weight.detach()[-1])]
    )
    assert not (tmp_path / "out" / "similarity.csv").exists()


def test_layers_that_do_nothing_leave_all_states_alike(tmp_path: Path, text: Path) -> None:
    model = made("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
    model.save_pretrained(tmp_path / "idle")
    command = ["analyze", str(tmp_path / "idle"), "--tokens", str(text), "--length", "16"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    found = rows(tmp_path / "out" / "similarity.csv")
    assert len(found) == 9
    assert all(float(row["cosine"]) == pytest.approx(1) for row in found)
    assert [float(row["ffn_rms"]) for row in rows(tmp_path / "out" / "activity.csv")] == [0.0, 0.0]
    figures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert figures == [
        "analysis-activity.png",
        "analysis-coefficients.png",
        "analysis-effective-rank.png",
        "analysis-shapes.png",
        "analysis-similarity.png",
    ]
    for name in figures:
        Image.open(tmp_path / "out" / name).verify()


def test_similarity_is_the_mean_cosine_of_the_models_states(tmp_path: Path, text: Path) -> None:
    model = made("polyrelu")
    model.save_pretrained(tmp_path / "one")
    command = ["analyze", str(tmp_path / "one"), "--tokens", str(text), "--length", "16", "--sequences", "3"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    tokens = torch.from_numpy(np.fromfile(text, dtype=np.uint16).astype(np.int64)[: 3 * 16]).view(3, 16)
    with torch.inference_mode():
        states = model(tokens, output_hidden_states=True).hidden_states
    expected = float(torch.cosine_similarity(states[0], states[1], dim=-1).mean())
    [one] = [
        row
        for row in rows(tmp_path / "out" / "similarity.csv")
        if (row["after_layer"], row["and_after_layer"]) == ("0", "1")
    ]
    assert float(one["cosine"]) == pytest.approx(expected, rel=1e-5)
    told: dict[str, Any] = json.loads((tmp_path / "out" / "studies.json").read_text())
    assert told["one"]["activity"]["tokens"] == 48


def test_checkpoints_of_one_name_are_told_apart_and_one_given_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("a", "b"):
        made("gelu").save_pretrained(tmp_path / folder / "last")
    paths = [str(tmp_path / folder / "last") for folder in ("a", "b")]
    assert main(["analyze", *paths, "--output", str(tmp_path / "out")]) == 0
    assert {row["checkpoint"] for row in rows(tmp_path / "out" / "effective-rank.csv")} == {
        "a/last",
        "b/last",
    }
    assert main(["analyze", paths[0], paths[0], "--output", str(tmp_path / "out")]) == 2
    assert "a checkpoint is named twice" in capsys.readouterr().err


def test_what_cannot_be_studied_is_refused_and_writes_nothing(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made("gelu").save_pretrained(tmp_path / "good")
    good, out, empty = str(tmp_path / "good"), str(tmp_path / "out"), tmp_path / "empty.npy"
    empty.touch()
    for arguments, said in (
        ([str(tmp_path / "none")], "is no folder, so no checkpoint"),
        ([good, "--tokens", str(tmp_path / "none")], "is no data set of tokens"),
        (
            [good, "--tokens", str(text), "--length", "4000"],
            "less than a window of 4000; name a smaller --length",
        ),
        ([good, "--tokens", str(empty)], "holds 0 tokens, less than a window"),
        ([good, str(tmp_path)], "holds no checkpoint"),
    ):
        assert main(["analyze", *arguments, "--output", out]) == 2
        assert said in capsys.readouterr().err
        assert not Path(out).exists()


def test_text_asks_for_transformers_and_weights_do_not(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made("gelu").save_pretrained(tmp_path / "good")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    command = ["analyze", str(tmp_path / "good"), "--output", str(tmp_path / "out")]
    assert main([*command, "--tokens", str(text)]) == 2
    assert "--tokens needs transformers: pip install 'polycom-ext[eval]'" in capsys.readouterr().err
    assert main(command) == 0


def test_a_run_keeps_its_study_for_the_report(tmp_path: Path) -> None:
    made("gelu").save_pretrained(tmp_path / "run")
    Record(tmp_path / "run").spec.write_text("trainer: megatron\nactivation: gelu\n")
    assert main(["analyze", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    kept = Record(tmp_path / "run").read_analysis()
    assert kept == json.loads((tmp_path / "out" / "studies.json").read_text())["run"]


def test_a_folder_that_is_no_runs_is_left_as_it_was(tmp_path: Path) -> None:
    """And its polynomial may be of any order."""
    made("polynorm", activation=described("polynorm-2")).save_pretrained(tmp_path / "model")
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert main(["analyze", str(tmp_path / "model"), "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before
    names = [row["coefficient"] for row in rows(tmp_path / "out" / "coefficients.csv")]
    assert names == ["a₀", "a₁", "a₂"] * 2


def test_sequences_are_no_longer_than_the_models_context_unless_it_is_said(
    tmp_path: Path, text: Path
) -> None:
    made("gelu").save_pretrained(tmp_path / "model")
    command = ["analyze", str(tmp_path / "model"), "--tokens", str(text), "--sequences", "2"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "studies.json").read_text())
    assert told["model"]["activity"]["tokens"] == 2 * PLAIN["max_position_embeddings"]


def test_a_name_is_text_in_the_figures(tmp_path: Path) -> None:
    name = r"$\frac{<b>"
    made("gelu").save_pretrained(tmp_path / name)
    assert main(["analyze", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 0
    assert {row["checkpoint"] for row in rows(tmp_path / "out" / "effective-rank.csv")} == {name}


def test_kinds_of_models_are_all_studied(tmp_path: Path) -> None:
    for kind in KINDS:
        made(kind).save_pretrained(tmp_path / "all" / kind)
    folders = [str(tmp_path / "all" / kind) for kind in KINDS]
    assert main(["analyze", *folders, "--output", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("kind", ["polynorm", "gated-experts"])
def test_a_model_has_the_same_study_in_every_form_of_checkpoints(
    tmp_path: Path, text: Path, kind: str
) -> None:
    made(kind).save_pretrained(tmp_path / "hf")
    for form in ("megatron", "olmo"):
        assert main(["convert", str(tmp_path / "hf"), str(tmp_path / form), "--to", form]) == 0
    folders = [str(tmp_path / form) for form in ("hf", "megatron", "olmo")]
    command = ["analyze", *folders, "--tokens", str(text), "--length", "16"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "studies.json").read_text())
    hf, megatron, olmo = ({**told[form], "source": ""} for form in ("hf", "megatron", "olmo"))
    assert hf["activity"]["tokens"] == 64
    assert hf == megatron == olmo


def test_a_diverged_model_is_studied_and_what_is_no_number_is_said_to_be_none(
    tmp_path: Path, text: Path
) -> None:
    model = made("polynorm")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
        model.model.layers[1].mlp.act_fn.weight[0] = torch.nan
    model.save_pretrained(tmp_path / "one")
    command = ["analyze", str(tmp_path / "one"), "--tokens", str(text), "--length", "16"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    ranks = {
        (row["layer"], row["weight"]): row["effective_rank"]
        for row in rows(tmp_path / "out" / "effective-rank.csv")
    }
    assert [key for key, rank in ranks.items() if rank == "nan"] == [("1", "up")]
    sizes = [row["ffn_rms"] for row in rows(tmp_path / "out" / "activity.csv")]
    assert [size == "nan" for size in sizes] == [False, True]
