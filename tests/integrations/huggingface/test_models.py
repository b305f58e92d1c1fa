"""PolyCom models in transformers: what they compute, save and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM

from polycom_ext import activations, functional
from polycom_ext.integrations.huggingface.configuration_polycom import REQUIRED, PolyComConfig

from .conftest import KINDS, PLAIN, made, tokens

ALONE = """
import sys, torch
sys.modules["polycom_ext"] = None  # not installed, as far as an import can tell
from transformers import AutoModelForCausalLM
ids, *folders = sys.argv[1:]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    assert type(next(iter(model.model.layers)).mlp).__module__.startswith("transformers_modules")
    with torch.no_grad():
        torch.save(model(torch.load(ids)).logits, folder + "/alone.pt")
"""


@pytest.mark.parametrize("kind", ["llama", "tied", "olmo", "olmo2", "olmoe"])
def test_generation_is_the_same_with_and_without_a_cache(kind: str) -> None:
    model = made(kind)
    with torch.no_grad():
        cached, plain = (
            model.generate(tokens(), max_new_tokens=8, do_sample=False, use_cache=cache)
            for cache in (True, False)
        )
    assert cached.shape[1] == 20
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_read_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.full
def test_saved_files_work_without_the_package(tmp_path: Path) -> None:
    ids = tmp_path / "ids.pt"
    torch.save(tokens(), ids)
    learning = [name for name, entry in activations.REGISTRY.items() if entry.learnable]
    expected = {}
    for kind in (*learning, "relu2", "hardswish", "olmo2", "olmoe", "gated-experts"):
        model = made(kind)
        model.save_pretrained(tmp_path / kind)
        with torch.no_grad():
            expected[kind] = model(tokens()).logits
    folders = [str(tmp_path / name) for name in expected]
    subprocess.run([sys.executable, "-c", ALONE, str(ids), *folders], check=True, cwd=tmp_path)
    for name, logits in expected.items():
        alone = torch.load(tmp_path / name / "alone.pt")
        assert torch.allclose(alone, logits, rtol=1e-5, atol=1e-5), name


def test_an_ffn_is_what_the_paper_says() -> None:
    feed_forward = made("llama").model.layers[0].mlp
    x = torch.randn(3, 5, PLAIN["hidden_size"])
    act = feed_forward.act_fn
    inner = functional.poly_norm(x @ feed_forward.up_proj.weight.T, act.weight, act.bias, 1e-6)
    torch.testing.assert_close(feed_forward(x), inner @ feed_forward.down_proj.weight.T)


def test_experts_are_weighted_as_the_router_says() -> None:
    block = made("olmoe").model.layers[0].mlp
    x = torch.randn(2, 3, PLAIN["hidden_size"])
    expected = torch.zeros_like(x)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        token = x[tuple(place)]
        probabilities = block.gate(token).softmax(-1)
        for expert in probabilities.topk(2).indices.tolist():
            expected[tuple(place)] += probabilities[expert] * block.experts(token[None], expert)[0]
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("key", [*REQUIRED, "rope_theta"])
def test_a_constant_that_is_missing_is_an_error(key: str, tmp_path: Path) -> None:
    PolyComConfig(**PLAIN).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for name in (key, "rope_parameters") if key == "rope_theta" else (key,):
        saved.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=key):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["polynorm", "xielu"])
def test_a_constant_of_the_activation_that_is_missing_is_an_error(name: str) -> None:
    for key in KINDS[name]["activation"].keys() - {"name", "gated"}:
        activation = {k: v for k, v in KINDS[name]["activation"].items() if k != key}
        with pytest.raises(ValueError, match=f"{name}.*{key}"):
            AutoModelForCausalLM.from_config(PolyComConfig(**{**PLAIN, "activation": activation}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"activation": "polynorm"},
        {"norm": {"kind": "batch", "affine": True, "bias": False}},
        {"norm_after": None},
        {"qk_norm": "column"},
        {"num_experts": 2, "num_experts_per_tok": 4},
        {"num_experts": 2},
    ],
    ids=str,
)
def test_a_value_that_means_nothing_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(wrong)).split("_per")[0].removeprefix("num_")):
        PolyComConfig(**{**PLAIN, **wrong})


def test_constants_of_the_activation_change_its_function() -> None:
    model = made("llama")
    activation = {**PLAIN["activation"], "eps": 10.0}
    other = AutoModelForCausalLM.from_config(PolyComConfig(**{**PLAIN, "activation": activation})).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert not torch.allclose(other(tokens()).logits, model(tokens()).logits, rtol=1e-3)


def test_coefficients_stay_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    made("llama").save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in half.named_parameters()}
    assert {kind for name, kind in kinds.items() if "act_fn" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "act_fn" not in name} == {torch.bfloat16}
    half(tokens(), labels=tokens()).loss.backward()


@pytest.mark.parametrize("kind", ["llama", "olmo2", "olmoe"])
def test_checkpointing_of_activations_changes_no_gradient(kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = made(kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_no_row_of_the_ffn_is_sharded_by_transformers() -> None:
    assert not [name for name in PolyComConfig(**PLAIN).base_model_tp_plan if "mlp" in name]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["llama", "olmo", pytest.param("olmo2", marks=pytest.mark.long)])
def test_the_compiled_forward_agrees(kind: str) -> None:
    model = made(kind)
    with torch.no_grad():
        expected = model(tokens()).logits
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True)(tokens()).logits, expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_kernels_agree(attention: str) -> None:
    model = made("olmoe")
    with torch.no_grad():
        expected = model(tokens()).logits
        model.set_attn_implementation(attention)
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
