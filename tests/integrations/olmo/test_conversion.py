"""OLMo's checkpoints as models apart from it, and back: the same logits, and the same weights to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM

from polycom_ext import activations, cli
from polycom_ext.integrations import huggingface
from polycom_ext.integrations.olmo.conversion import STEP

from .conftest import MODEL, MOE

huggingface.register()
pytestmark = pytest.mark.usefixtures("olmo")

TOKENS = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(3))
POLYNORM = {"activation_type": "polynorm"}
DEFAULT_NORM = {"layer_norm_type": "default"}
MODELS: dict[str, dict[str, Any]] = {
    **{name: {"activation_type": name} for name in activations.REGISTRY},
    "experts": {**MOE, **POLYNORM},
    "gated experts": {**MOE, "activation_type": "swiglu"},
    "OLMo 1": {
        **DEFAULT_NORM,
        "layer_norm_with_affine": False,
        "clip_qkv": 0.05,
        "activation_type": "swiglu",
    },
    "OLMo 1 with PolyNorm": {**DEFAULT_NORM, "layer_norm_with_affine": False, "clip_qkv": 0.05, **POLYNORM},
    "OLMo 2": {"norm_after": True, "attention_layer_norm": True, "activation_type": "swiglu"},
    "OLMo 2 with PolyNorm": {"norm_after": True, "attention_layer_norm": True, **POLYNORM},
    "experts, norms after": {**MOE, "norm_after": True, **POLYNORM},
    "grouped queries, tied": {
        **{"n_kv_heads": 1, "weight_tying": True, "rope_theta": 500, "layer_norm_eps": 1e-3},
        "activation_type": "polyrelu-2",
    },
    "biases": {
        **DEFAULT_NORM,
        "include_bias": True,
        "bias_for_layer_norm": None,
        "weight_tying": True,
        **POLYNORM,
    },
    "normalised queries": {"attention_layer_norm": True, **POLYNORM},
    "more embeddings than tokens": {"embedding_size": 384, "mlp_hidden_size": None, **POLYNORM},
    "projections apart": {"block_type": "llama", "norm_after": True, **POLYNORM},  # its norms stay before
    "groups of blocks": {"block_group_size": 2, "n_layers": 4, **POLYNORM},
}
MARKS: dict[str, Any] = {
    **dict.fromkeys(MODELS, pytest.mark.long),
    **dict.fromkeys(("gated experts", "OLMo 1", "biases", "groups of blocks"), pytest.mark.full),
    **dict.fromkeys(("polynorm", "OLMo 2 with PolyNorm"), ()),
}
"""In `full` those with a row of the table or a rule of their own."""
STOCK = {
    **{"swiglu": "llama", "OLMo 1": "olmo", "OLMo 2": "olmo2", "gated experts": "olmoe"},
    **dict.fromkeys(("gelu", "relu", "relu2", "silu", "mish"), "arcee"),
}
"""What transformers computes by itself, with no code of ours."""


def saved(folder: Path, **changes: Any) -> Path:
    """A checkpoint of a model after two steps, in the files that OLMo writes."""
    from olmo.config import ModelConfig, TrainConfig
    from olmo.model import OLMo

    torch.manual_seed(0)
    config = ModelConfig(**{**MODEL, "init_std": 0.2, **changes})
    model = OLMo(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        logits = model(TOKENS).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten()).backward()
        optimizer.step()
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "model.pt")
    TrainConfig(model=config).save(folder / "config.yaml")
    return folder


def olmos(folder: Path) -> Any:
    """The model that OLMo's own loader makes of it."""
    from olmo.model import OLMo

    return OLMo.from_checkpoint(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS).logits
    return result


def convert(source: Path, target: Path, form: str) -> Path:
    assert cli.main(["convert", str(source), str(target), "--to", form]) == 0
    return target / STEP if form == "olmo" else target


def transformers(folder: Path) -> Any:
    """The model that transformers makes of it."""
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS[name]) for name in MODELS])
def test_a_model_is_the_same_in_transformers_and_back_in_olmo(name: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "step2-unsharded", **MODELS[name])
    theirs = olmos(source)
    folder = convert(source, tmp_path / "hf", "hf")
    model = transformers(folder)
    assert model.config.model_type == STOCK.get(name, "polycom")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    back = convert(folder, tmp_path / "olmo", "olmo")
    again = olmos(back)
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-5)
    if name not in ("projections apart", "groups of blocks"):  # what is written has one form
        expected = theirs.state_dict()
        assert again.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    assert contents(convert(back, tmp_path / "once more", "hf")) == contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file that tells nothing of where it comes from."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "conversion.json"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("plain experts", marks=pytest.mark.full),
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("polynorm", "swiglu", "grouped queries, tied", "biases")
        ),
    ],
)
def test_a_model_is_the_same_by_way_of_megatrons_form(name: str, tmp_path: Path) -> None:
    changes = {**MOE, **POLYNORM, "attention_layer_norm": False} if name == "plain experts" else MODELS[name]
    source = saved(tmp_path / "step2-unsharded", **changes)
    back = convert(convert(source, tmp_path / "megatron", "megatron"), tmp_path / "olmo", "olmo")
    weights, expected = (torch.load(folder / "model.pt") for folder in (back, source))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights.items())
    torch.testing.assert_close(logits(olmos(back)), logits(olmos(source)))
