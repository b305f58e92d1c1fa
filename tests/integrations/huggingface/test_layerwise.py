"""A model run a block at a time computes what the whole model does, and its FFNs are told of truly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from polycom_ext.checkpoints.command import opened
from polycom_ext.checkpoints.model import Model
from polycom_ext.integrations.huggingface import layerwise

from .conftest import KINDS, made, tokens


def saved(model: Any, folder: Path) -> Model:
    model.save_pretrained(folder)
    return opened(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_each_blocks_output_is_that_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    with torch.inference_mode():
        expected = model(tokens(), output_hidden_states=True).hidden_states
    read = saved(model, tmp_path)
    torch.testing.assert_close(layerwise.embedded(read, tokens()), expected[0])
    found = [layer.hidden for layer in layerwise.layers(read, tokens())]
    torch.testing.assert_close(found[0], expected[1])
    torch.testing.assert_close(model.model.norm(found[1]), expected[2])  # what transformers calls the last


@pytest.mark.parametrize("kind", ["relu", "polyrelu"])  # which gives 0 there, and a₀
def test_a_unit_that_is_never_reached_is_constant_and_others_are_not(kind: str, tmp_path: Path) -> None:
    model = made(kind, mlp_bias=True, num_hidden_layers=2)
    with torch.no_grad():
        for layer, dead in zip(model.model.layers, (12, 0), strict=True):
            layer.mlp.up_proj.weight.mul_(0.01)
            layer.mlp.up_proj.bias.fill_(10.0)
            layer.mlp.up_proj.bias[:dead] = -10.0
    read = saved(model, tmp_path)
    assert [layer.constant for layer in layerwise.layers(read, tokens())] == [12 / 48, 0.0]
    assert [layer.constant for layer in layerwise.layers(read, tokens()[:1, :1])] == [0.0, 0.0]


def test_the_sizes_are_those_of_the_activation_and_of_what_the_ffn_adds(tmp_path: Path) -> None:
    model = made("polynorm", num_hidden_layers=1)
    seen: dict[str, torch.Tensor] = {}
    mlp = model.model.layers[0].mlp
    mlp.act_fn.register_forward_hook(lambda *given: seen.update(activation=given[2]))
    mlp.register_forward_hook(lambda *given: seen.update(ffn=given[2]))
    with torch.inference_mode():
        model(tokens())
    [found] = layerwise.layers(saved(model, tmp_path), tokens())
    for name, value in (("activation", found.activation_rms), ("ffn", found.ffn_rms)):
        assert value == pytest.approx(float(seen[name].square().mean().sqrt()), rel=1e-5)


def test_experts_count_the_units_of_those_that_got_tokens(tmp_path: Path) -> None:
    """Two of four get all tokens; their halves and the others' whole are never reached."""
    model = made("olmoe", activation={"name": "relu", "gated": False}, num_hidden_layers=1)
    sparse = model.model.layers[0].mlp
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight.fill_(1.0)
        sparse.experts.up_proj.abs_()
        sparse.experts.up_proj[:, :24].zero_()
    [found] = layerwise.layers(saved(model, tmp_path), tokens())
    assert 0.5 <= found.constant < 1.0
