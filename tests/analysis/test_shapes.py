"""The curves that stand for an activation are its function, on the row that is said."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from polycom_ext import reference
from polycom_ext.analysis.shapes import POINTS, on_row
from polycom_ext.cli import main

from ..integrations.huggingface.conftest import PLAIN, made


@settings(deadline=None)
@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=200))
def test_a_curve_ascends_over_the_whole_row_and_holds_pairs_of_it(values: list[int]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    shape = on_row(x, 3 * x + 1)
    assert shape.x == sorted(set(shape.x))
    assert set(shape.x) <= set(x.tolist())
    assert (shape.x[0], shape.x[-1]) == (min(values), max(values))
    assert len(shape.x) <= POINTS
    assert shape.y == [3 * value + 1 for value in shape.x]
    assert shape.rms == pytest.approx(float(x.square().mean().sqrt()))


def curves(output: Path) -> dict[int, list[tuple[float, float, float]]]:
    found: dict[int, list[tuple[float, float, float]]] = {}
    with (output / "shapes.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            point = (float(row["rms_of_row"]), float(row["x"]), float(row["y"]))
            found.setdefault(int(row["layer"]), []).append(point)
    return found


def test_without_text_the_row_is_of_standard_normal_numbers(tmp_path: Path) -> None:
    model = made("polynorm")
    model.save_pretrained(tmp_path / "one")
    assert main(["analyze", str(tmp_path / "one"), "--output", str(tmp_path / "out")]) == 0
    found = curves(tmp_path / "out")
    assert sorted(found) == [0, 1]
    width = PLAIN["intermediate_size"]
    row = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(width) + 0.5).double() / width)
    act = model.model.layers[1].mlp.act_fn
    expected = dict(zip(row.tolist(), reference.poly_norm(row, act.weight, act.bias).tolist(), strict=True))
    assert len(found[1]) == width
    for rms, x, y in found[1]:
        nearest = min(expected, key=lambda value: abs(value - x))
        assert (x, y) == pytest.approx((nearest, expected[nearest]), rel=1e-6)
        assert rms == pytest.approx(float(row.square().mean().sqrt()))


def test_with_text_the_row_is_one_of_the_texts(tmp_path: Path) -> None:
    model = made("polynorm")
    model.save_pretrained(tmp_path / "one")
    text = tmp_path / "text.npy"
    tokens = np.random.default_rng(0).integers(0, PLAIN["vocab_size"], 64, dtype=np.uint16)
    tokens.tofile(text)
    inputs: list[torch.Tensor] = []
    act = model.model.layers[1].mlp.act_fn
    act.register_forward_hook(lambda *heard: inputs.append(heard[1][0].flatten(0, -2)))
    with torch.inference_mode():
        model(torch.from_numpy(tokens[:32].astype(np.int64)).view(2, 16))
    sizes = inputs[0].square().mean(dim=-1).sqrt()
    row = inputs[0][int(sizes.argsort()[(len(sizes) - 1) // 2])]
    command = ["analyze", str(tmp_path / "one"), "--tokens", str(text), "--length", "16", "--sequences", "2"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    found = curves(tmp_path / "out")[1]
    assert [x for _, x, _ in found] == pytest.approx(row.sort().values.tolist(), rel=1e-4, abs=1e-6)
    y = reference.poly_norm(row, act.weight, act.bias).detach()[row.argsort()]
    assert [made_of_it for _, _, made_of_it in found] == pytest.approx(y.tolist(), rel=1e-3, abs=1e-5)


def test_a_gated_activation_has_no_curve(tmp_path: Path) -> None:
    for kind in ("swiglu", "gelu"):
        made(kind).save_pretrained(tmp_path / kind)
    assert main(["analyze", str(tmp_path / "swiglu"), "--output", str(tmp_path / "out")]) == 0
    assert curves(tmp_path / "out") == {}
    assert not (tmp_path / "out" / "analysis-shapes.png").exists()
    both = ["analyze", str(tmp_path / "swiglu"), str(tmp_path / "gelu")]
    assert main([*both, "--output", str(tmp_path / "both")]) == 0
    assert (tmp_path / "both" / "analysis-shapes.png").is_file()
