"""What lies between FC1 and FC2 in each of Megatron's layers: one pass, less kept, the same function."""

from typing import Any

import pytest

from .conftest import Trainer

BY_PLAIN_OPERATIONS = ("polyprelu", "gelu")


@pytest.fixture(scope="module")
def layers(train: Trainer) -> dict[str, Any]:
    """What layers.py found."""
    return train.script("layers.py")


def test_with_bias_and_router_s_weights_the_activation_is_what_separate_operations_are(
    layers: dict[str, Any],
) -> None:
    """Output, and the gradients of the rows, the router's weights, FC1's biases and the coefficients."""
    for name, case in layers["fused"].items():
        assert any("linear_fc1.bias" in gradient for gradient in case["names"]), name
        assert ("dprobs" in case["names"]) is not name.startswith("dense")
        if any(activation in name for activation in BY_PLAIN_OPERATIONS):
            assert case["difference"] == 0, name
        else:  # in bfloat16 separate operations round three times
            assert case["difference"] < (2e-2 if name.endswith("bfloat16") else 1e-6), name
    for name, case in layers["weights on the input"].items():
        assert case["difference"] < 1e-6, name


def test_fused_it_is_one_pass(layers: dict[str, Any]) -> None:
    for name, passes in layers["passes"].items():
        of_linears = ("mm", "cat", "stack")  # the last of the biases of grouped experts
        between = [one for one in passes if one not in of_linears]
        if not any(activation in name for activation in BY_PLAIN_OPERATIONS):
            assert between == ["polynomial"] * (3 if name.startswith("sequential") else 1), name
        else:
            assert "add" in between, name


def test_fused_it_keeps_two_tensors_of_an_expert_where_separate_operations_keep_three(
    layers: dict[str, Any],
) -> None:
    """FC1's output and FC2's input; of those of a dense layer both keep these two."""
    for name, case in layers["fused"].items():
        separate = 2 if name.startswith("dense") else 3
        fused = separate if any(activation in name for activation in BY_PLAIN_OPERATIONS) else 2
        assert case["kept"] == [fused, separate], name


def test_recomputed_it_keeps_one_and_changes_no_bit(layers: dict[str, Any]) -> None:
    """FC1's output; moe_act for grouped experts, mlp_act for everything else."""
    assert len(layers["recomputed"]) == 3 * 4
    for name, case in layers["recomputed"].items():
        assert case == {"difference": 0, "kept": 1, "evaluates": True}, name


def test_grouped_experts_are_the_sequential_ones(layers: dict[str, Any]) -> None:
    experts = layers["experts"]
    assert experts["difference"] < 1e-6
    assert experts["parameters"] == [2, 2]
    assert experts["keys"][0] == experts["keys"][1] != []
