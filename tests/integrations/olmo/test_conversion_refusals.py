"""What cannot be converted from or to OLMo's form is refused in one sentence, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from polycom_ext import cli
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.olmo import exchange

from .conftest import MOE
from .test_conversion import POLYNORM, saved

Checkpoint = Callable[..., Path]
EXPERTS = {**MOE, **POLYNORM}
LACKING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"{name} something else": ({}, {name: "something else"}) for name in exchange.PLAIN},
    **{f"{name} something else": (EXPERTS, {name: "something else"}) for name in exchange.PLAIN_EXPERTS},
    "an output layer with a bias": ({}, {"include_bias": True}),
    "RMS norms with a bias": ({}, {"bias_for_layer_norm": True}),
    "normalised otherwise than by rms": ({}, {"attention_layer_norm": True, "layer_norm_type": "default"}),
    "clipped before they are normalised": ({}, {"attention_layer_norm": True, "clip_qkv": 8.0}),
    "blocks of the type post": ({}, {"block_type": "post"}),
    "norms of the type lp": ({}, {"layer_norm_type": "lp"}),
    "does not say model.d_model": ({}, {"d_model": None}),
    "unknown activation 'polynone'": ({}, {"activation_type": "polynone"}),
    "has nothing for model.layers.2": ({}, {"n_layers": 3}),
    "holds transformer.blocks.1": ({}, {"n_layers": 1}),
    "have 96 rows, and 2 + 1 + 1 heads of 16 need 64": ({}, {"n_kv_heads": 1}),
    "model.embed_tokens.weight has shape (257, 32), the model needs (384, 32)": ({}, {"embedding_size": 384}),
    "has nothing for lm_head.weight": ({"weight_tying": True}, {"weight_tying": False}),
}


@pytest.fixture(scope="module")
def checkpoint(olmo: None, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One to be spoilt in copies."""
    made: dict[str, Path] = {}

    def make(folder: Path, **changes: Any) -> Path:
        key = repr(changes)
        if key not in made:
            made[key] = saved(tmp_path_factory.mktemp("checkpoint") / "it", **{**POLYNORM, **changes})
        return shutil.copytree(made[key], folder)

    return make


@pytest.mark.parametrize("said", LACKING)
def test_a_model_that_the_format_lacks_is_refused(
    checkpoint: Checkpoint, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, changes = LACKING[said]
    copy = checkpoint(tmp_path / "copy", **model)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["model"] = {k: v for k, v in {**config["model"], **changes}.items() if (k, v) != ("d_model", None)}
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    refused(tmp_path, capsys, said)


def cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "model.pt").read_bytes())
    weight = torch.load(folder / "model.pt")["transformer.wte.weight"]
    data[data.find(weight.numpy().tobytes()) + 5] ^= 1
    (folder / "model.pt").write_bytes(data)


def save_by_local(folder: Path) -> None:
    (folder / "model.pt").unlink()
    (folder / "model").mkdir()
    torch.save({}, folder / "model" / "rank0.pt")


class Command:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def add_code(folder: Path) -> None:
    state = torch.load(folder / "model.pt")
    torch.save({**state, "transformer.wte.weight": Command()}, folder / "model.pt")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "holds model.pt without its end": cut("model.pt"),
    "lacks model.pt": lambda folder: (folder / "model.pt").unlink(),
    "model.pt cannot be read: Bad CRC-32": flip_a_bit,
    "lacks config.yaml": lambda folder: (folder / "config.yaml").unlink(),
    "config.yaml cannot be read": lambda folder: (folder / "config.yaml").write_text("model: [\n"),
    "has no section `model`": lambda folder: (folder / "config.yaml").write_text("run_name: it\n"),
    "scripts/unshard.py": save_by_local,
    "holds no state of a model": lambda folder: torch.save([1, 2], folder / "model.pt"),
    "system where a tensor is expected": add_code,
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_nothing_of_it_run(
    checkpoint: Checkpoint,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    DAMAGES[said](checkpoint(tmp_path / "step3-unsharded"))
    (tmp_path / "step3-unsharded").rename(tmp_path / "step2-unsharded")
    refused(tmp_path, capsys, said, "step2-unsharded")
    assert not Path("ran").exists()


def refused(
    folder: Path, capsys: pytest.CaptureFixture[str], said: str, source: str = "copy", form: str = "hf"
) -> None:
    """Exit status 2, one sentence, and nothing left."""
    before = set(folder.iterdir())
    assert cli.main(["convert", str(folder / source), str(folder / "new"), "--to", form]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert set(folder.iterdir()) == before


CONFIG: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
    **{"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    **{"rms_norm_eps": 1e-5, "rope_theta": 5000.0, "norm_after": False, "qk_norm": None, "clip_qkv": None},
    "activation": {"name": "polynorm", "gated": False, "order": 3, "eps": 1e-6},
    "norm": {"kind": "rms", "affine": True, "bias": False},
    **{"num_experts": 0, "num_experts_per_tok": 0, "norm_topk_prob": False},
}
BOTH = {"attention_bias": True, "mlp_bias": True}
OLMO_LACKS: dict[str, dict[str, Any]] = {
    "heads of 16 numbers": {"head_dim": 16},
    "normalised head by head": {"qk_norm": "head"},
    "layer norms around": {"qk_norm": "row", "norm": {"kind": "layer", "affine": True, "bias": False}},
    "clipped after they are normalised": {"qk_norm": "row", "clip_qkv": 8.0},
    "in the attention or the FFN alone": {"attention_bias": True},
    "without one in the output layer": BOTH,
    "biases in a model of experts": {**BOTH, "tie_word_embeddings": True, "num_experts": 4},
    "no whole number": {"rope_theta": 5000.5},
    "made to sum to 1": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "not polycom_ext's": {"activation": {"name": "polynorm", "gated": False, "order": 3, "eps": 1e-3}},
}


@pytest.mark.parametrize("said", OLMO_LACKS)
def test_a_model_that_olmo_lacks_is_refused(said: str) -> None:
    exchange.written(CONFIG, "models/it")
    with pytest.raises(
        PolycomError, match=rf"^models/it has [^\n]*{said}[^\n]*, for which OLMo has no place$"
    ):
        exchange.written({**CONFIG, **OLMO_LACKS[said]}, "models/it")
