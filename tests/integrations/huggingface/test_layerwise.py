"""A model run a block at a time computes what the whole model does, and its FFNs are told of truly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

pytest.importorskip("transformers")

from polycom_ext.analysis.study import study
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
    model.model.layers[0].register_forward_hook(lambda *given: seen.update(hidden=given[2]))
    with torch.inference_mode():
        model(tokens())
    [found] = layerwise.layers(saved(model, tmp_path), tokens())
    sizes = {"activation": found.activation_rms, "ffn": found.ffn_rms, "hidden": found.hidden_rms}
    for name, value in sizes.items():
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


@pytest.mark.parametrize("kind", ["polynorm", "olmoe"])
def test_the_row_is_the_one_of_median_rms_with_what_the_activation_made_of_it(
    kind: str, tmp_path: Path
) -> None:
    """Of experts, each of which has a median row, the one nearest to the median of all."""
    model = made(kind, num_hidden_layers=1)
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    mlp = model.model.layers[0].mlp
    act_fn = mlp.experts.act_fn if kind == "olmoe" else mlp.act_fn
    act_fn.register_forward_hook(lambda *given: parts.append((given[1][0].flatten(0, -2), given[2])))
    with torch.inference_mode():
        model(tokens())
    sizes = [rows.square().mean(dim=-1).sqrt() for rows, _ in parts]
    middle = torch.cat(sizes).median()
    medians = torch.stack([size.median() for size in sizes])
    part = int((medians - middle).abs().argmin())
    row = int((sizes[part] == medians[part]).nonzero())
    [found] = layerwise.layers(saved(model, tmp_path), tokens())
    assert found.row is not None
    torch.testing.assert_close(found.row[0], parts[part][0][row])
    torch.testing.assert_close(found.row[1], parts[part][1].flatten(0, -2)[row])


def test_a_gated_activation_has_no_row(tmp_path: Path) -> None:
    model = made("swiglu")
    assert [layer.row for layer in layerwise.layers(saved(model, tmp_path), tokens())] == [None, None]


@pytest.mark.parametrize("kind", ["llama", "gated-experts"])
def test_the_weights_of_one_block_are_in_memory_at_a_time(kind: str, tmp_path: Path) -> None:
    """Measured: the bytes of all storages that were read and are still held by somebody, at each reading."""
    model = saved(made(kind, num_hidden_layers=5), tmp_path)
    read: list[tuple[StorageWeakRef, int]] = []
    peak = 0

    def counted(name: str) -> Callable[[], torch.Tensor]:
        def reader() -> torch.Tensor:
            nonlocal peak
            tensor = model.tensors[name]().clone()
            read.append((StorageWeakRef(tensor.untyped_storage()), tensor.nbytes))
            peak = max(peak, sum(size for storage, size in read if not storage.expired()))
            return tensor

        return reader

    watched = Model(model.config, {name: counted(name) for name in model.tensors}, model.source)
    block = sum(model.tensors[name]().nbytes for name in model.tensors if name.startswith("model.layers.0."))
    assert [layer.hidden.shape for layer in layerwise.layers(watched, tokens())] == [(2, 12, 32)] * 5
    assert peak == block
    peak = 0
    largest = max(model.tensors[name]().nbytes for name in model.tensors if ".mlp." in name)
    study(watched, None, lambda: None)
    assert peak <= 2 * largest
