"""A trained model as one of a larger family of activations, of which it is a member: the same function.

Lemma 1 of the paper: ReLU and ReLU^2 are PolyReLUs, with the coefficient 1 of x or x^2 and 0 of the others.
And a polynomial is one of a higher order, with the coefficient 0 of the powers that it did not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from polycom_ext.activations import parse
from polycom_ext.checkpoints.constants import complete, described
from polycom_ext.checkpoints.model import Model
from polycom_ext.errors import PolycomError

if TYPE_CHECKING:
    from torch import Tensor

POWERS = {("relu", "polyrelu"): 1, ("relu2", "polyrelu"): 2}
"""What has no coefficients, and what it is a member of -> the power whose coefficient is 1."""


def upgraded(model: Model, activation: str) -> Model:
    """The model with another activation, NAME or NAME-ORDER, and the same function.

    Raises PolycomError where the model's activation is not a member of that one.
    """
    complete(model.config, model.source)
    old, new = model.config["activation"], described(activation)
    power = POWERS.get((old["name"], new["name"]))
    polynomial = old["name"] == new["name"] and parse(new["name"])[0].ordered
    if polynomial:
        new = {**old, "order": new["order"]}  # the constants are those that it was trained with
    least = old["order"] if polynomial else power
    if least is None or new.get("order", 0) < least or old == new:
        raise PolycomError(
            f"{model.source} has {_name(old)}, which is no member of {_name(new)}: relu and relu2 are "
            "ones of polyrelu, and polynomials are ones of themselves in a higher order"
        )
    tensors = dict(model.tensors)
    for layer in range(model.config["num_hidden_layers"]):
        inside = "experts." if model.config["num_experts"] else ""
        name = f"model.layers.{layer}.mlp.{inside}act_fn."
        if polynomial:
            tensors[name + "weight"] = _raised(tensors[name + "weight"], new["order"])
        else:
            tensors[name + "weight"] = _alone(least, new["order"])
            tensors[name + "bias"] = _zero
    return Model({**model.config, "activation": new}, tensors, model.source, model.files)


def _name(activation: dict[str, Any]) -> str:
    return f"{activation['name']}-{activation['order']}" if "order" in activation else activation["name"]


def _alone(power: int, order: int) -> Callable[[], Tensor]:
    """Coefficients in descending order: 1 of that power."""

    def read() -> Tensor:
        import torch

        weight = torch.zeros(order)
        weight[-power] = 1
        return weight

    return read


def _raised(lower: Callable[[], Tensor], order: int) -> Callable[[], Tensor]:
    """Coefficients in descending order: 0 of the powers that are new."""

    def read() -> Tensor:
        import torch

        weight = lower()
        return torch.cat((weight.new_zeros(order - len(weight)), weight))

    return read


def _zero() -> Tensor:
    import torch

    return torch.zeros(1)
