"""A model's activation, and what it has learned in a layer."""

from __future__ import annotations

from torch import nn

from polycom_ext import activations
from polycom_ext.checkpoints.model import Model
from polycom_ext.modules import coefficients


def inside(model: Model, layer: int) -> str:
    """Where the weights of a layer's FFN, or of its experts', begin."""
    return f"model.layers.{layer}.mlp." + ("experts." if model.config["num_experts"] else "")


def activation(model: Model) -> nn.Module:
    """As it is at the start of training, in float64."""
    told = model.config["activation"]
    order = f"-{told['order']}" if "order" in told else ""
    return activations.build(
        told["name"] + order,
        width=model.config["intermediate_size"],
        hidden=model.config["hidden_size"],
    ).double()


def learned(model: Model, module: nn.Module, layer: int) -> dict[str, float]:
    """{title: value} of each coefficient of a layer, which the module has from then on."""
    prefix = f"{inside(model, layer)}act_fn."
    names = [name for name, _ in module.named_parameters()]
    module.load_state_dict({name: model.tensors[prefix + name]() for name in names})
    return coefficients(module) if names else {}
