"""Reading coefficients from checkpoints of torch.distributed.checkpoint, under Megatron's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron.coefficients import from_megatron

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled.*intent is to save")


def save(directory: Path, tensors: dict[str, torch.Tensor], step: int = 400) -> Path:
    state: dict[str, Any] = {"decoder.layers.mlp.linear_fc1.weight": torch.ones(2, 8, 4), **tensors}
    checkpoint = directory / f"iter_{step:07d}"
    dcp.save(state, storage_writer=dcp.FileSystemWriter(checkpoint), no_dist=True)
    return checkpoint


def homogeneous(layers: int, order: int = 3) -> dict[str, torch.Tensor]:
    weight = torch.arange(layers * order, dtype=torch.float32).reshape(layers, order)
    return {
        "decoder.layers.mlp.activation_func.weight": weight,
        "decoder.layers.mlp.activation_func.bias": -torch.arange(layers, dtype=torch.float32).reshape(
            layers, 1
        ),
    }


def test_layers_that_share_a_key_are_told_apart(tmp_path: Path) -> None:
    read = from_megatron(save(tmp_path, homogeneous(12)), "polynorm")
    assert (read["step"], read["activation"]) == (400, "polynorm")
    assert [layer["name"] for layer in read["layers"]] == [f"decoder.layers.{i}.mlp" for i in range(12)]
    assert read["layers"][11] == {"name": "decoder.layers.11.mlp", "weight": [33, 34, 35], "bias": [-11]}


def test_layers_with_their_own_key_keep_it_in_the_order_of_the_model(tmp_path: Path) -> None:
    tensors = {}
    for layer in range(11):
        tensors[f"decoder.layers.{layer}.mlp.experts.activation_func.weight"] = torch.full((2,), float(layer))
        tensors[f"decoder.layers.{layer}.mlp.experts.activation_func.bias"] = torch.zeros(1)
        tensors[f"decoder.layers.{layer}.mlp.experts.activation_func.slope"] = torch.full((1,), 0.25)
    read = from_megatron(save(tmp_path, tensors), "polyprelu-2")
    assert [layer["weight"][0] for layer in read["layers"]] == list(range(11))
    assert read["layers"][3] == {
        "name": "decoder.layers.3.mlp.experts",
        "weight": [3, 3],
        "bias": [0],
        "slope": [0.25],
    }


def test_experts_with_their_own_coefficients_are_told_apart(tmp_path: Path) -> None:
    key = "decoder.layers.mlp.experts.activation_func"
    weight = torch.arange(12, dtype=torch.float32).reshape(2, 2, 3)
    read = from_megatron(
        save(tmp_path, {f"{key}.weight": weight, f"{key}.bias": torch.zeros(2, 2, 1)}), "polyrelu"
    )
    assert {layer["name"]: layer["weight"] for layer in read["layers"]} == {
        "decoder.layers.0.mlp.experts.0": [0, 1, 2],
        "decoder.layers.0.mlp.experts.1": [3, 4, 5],
        "decoder.layers.1.mlp.experts.0": [6, 7, 8],
        "decoder.layers.1.mlp.experts.1": [9, 10, 11],
    }


def test_the_optimizer_s_copies_are_not_taken_for_the_parameters(tmp_path: Path) -> None:
    tensors = homogeneous(2)
    for prefix in ("optimizer.state.exp_avg", "chained_0.optimizer.state.fp32_param"):
        tensors |= {f"{prefix}.{key}": torch.full_like(value, 9) for key, value in homogeneous(2).items()}
    read = from_megatron(save(tmp_path, tensors), "polynorm")
    assert [layer["weight"] for layer in read["layers"]] == [[0, 1, 2], [3, 4, 5]]


def test_the_folder_above_means_its_latest_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, homogeneous(1), step=50)
    save(tmp_path, homogeneous(2), step=100)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100\n")
    read = from_megatron(tmp_path, "polynorm")
    assert (read["step"], len(read["layers"])) == (100, 2)


def test_an_activation_without_coefficients_has_none(tmp_path: Path) -> None:
    assert from_megatron(save(tmp_path, {}), "swiglu")["layers"] == []


def test_parameters_have_the_names_of_the_module(tmp_path: Path) -> None:
    key = "decoder.layers.mlp.activation_func"
    saved = {
        f"{key}.alpha_p": torch.tensor([[0.25], [0.5]]),
        f"{key}.alpha_n": torch.tensor([[-1.0], [-2.0]]),
    }
    checkpoint = save(tmp_path, saved)
    assert from_megatron(checkpoint, "xielu")["layers"][1] == {
        "name": "decoder.layers.1.mlp",
        "alpha_n": [-2],
        "alpha_p": [0.5],
    }
    with pytest.raises(PolycomError, match=r"does not hold 'swish': .* has alpha_n of 1, alpha_p of 1"):
        from_megatron(checkpoint, "swish")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolycomError, match="not a torch_dist checkpoint"):
        from_megatron(tmp_path, "polynorm")
    with pytest.raises(PolycomError, match="holds no coefficients: it was not trained with 'polynorm'"):
        from_megatron(save(tmp_path, {}), "polynorm")
    with pytest.raises(
        PolycomError, match=r"does not hold 'polyrelu-4': decoder.layers.0.mlp has .*weight of 3"
    ):
        from_megatron(save(tmp_path / "order", homogeneous(1)), "polyrelu-4")
