"""Losses on token files: of the windows that each form's trainer makes, as the formula says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from polycom_ext.errors import PolycomError
from polycom_ext.evaluation import tokens

from .token_files import COUNT, LENGTH, written


@pytest.mark.parametrize(("form", "targets"), [("megatron", LENGTH), ("olmo", LENGTH - 1)])
def test_a_loss_is_the_mean_over_the_trainer_s_windows(
    form: str, targets: int, ids: Any, model: Path, tmp_path: Path
) -> None:
    net = AutoModelForCausalLM.from_pretrained(model).eval()
    cut = tokens.windows(written(tmp_path / "set", form, ids), LENGTH, 512)
    found = tokens.measure(net, cut, None, 2)
    losses = []
    for start in range(0, LENGTH * COUNT, LENGTH):
        window = torch.tensor(ids[start : start + targets + 1])
        with torch.no_grad():
            chances = net(window[None, :-1]).logits[0].double().log_softmax(-1)
        losses += [-float(chances[place, token]) for place, token in enumerate(window[1:])]
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found["perplexity"] == math.exp(found["loss"])
    assert (found["windows"], found["tokens"]) == (COUNT, COUNT * targets)
    assert tokens.measure(net, cut, 2, 2)["tokens"] == 2 * targets


def test_a_data_set_is_known_by_its_prefix_and_by_each_of_its_files(ids: Any, tmp_path: Path) -> None:
    prefix = written(tmp_path / "a.bin=b", "megatron", ids)
    for suffix in ("", ".bin", ".idx"):
        assert tokens.windows(Path(f"{prefix}{suffix}"), LENGTH, 512).count == COUNT


def test_what_cannot_be_measured_is_said(ids: Any, tmp_path: Path) -> None:
    prefix = written(tmp_path / "set", "megatron", ids)
    (tmp_path / "text.txt").write_text("no tokens")
    with pytest.raises(PolycomError, match=r"text\.txt is no data set of tokens"):
        tokens.windows(tmp_path / "text.txt", LENGTH, 512)
    with pytest.raises(PolycomError, match="holds 167 tokens, less than a window of 1025"):
        tokens.windows(prefix, 1024, 512)
    with pytest.raises(PolycomError, match="not below the model's vocab_size 100"):
        tokens.windows(prefix, LENGTH, 100)
    stored = Path(f"{prefix}.bin")
    stored.write_bytes(stored.read_bytes()[:-2])
    with pytest.raises(PolycomError, match=r"where .* asks for"):
        tokens.windows(prefix, LENGTH, 512)


def test_a_manifest_s_type_is_the_type_that_is_read(ids: Any, tmp_path: Path) -> None:
    prefix = written(tmp_path / "set", "olmo", ids)
    names: dict[str, Any] = {
        "files": {".npy": 2 * len(ids)},
        "dtype": "uint32",
        "vocab_size": 512,
        "tokenizer": "",
    }
    (tmp_path / "set.json").write_text(json.dumps({**names, "eos_id": 511, "tokenizer_sha256": ""}))
    with pytest.raises(PolycomError, match="holds tokens of uint32"):
        tokens.windows(prefix, LENGTH, 512)
