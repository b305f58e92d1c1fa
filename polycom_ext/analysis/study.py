"""A checkpoint studied layer by layer; one layer's weights are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from polycom_ext import activations
from polycom_ext.analysis.spectrum import effective_rank
from polycom_ext.checkpoints.model import Model
from polycom_ext.errors import PolycomError
from polycom_ext.modules import coefficients

WEIGHTS = ("up", "gate", "down")
"""An FFN's linear layers, of which only a gated one has the second."""


@dataclass(frozen=True)
class Layer:
    """One block."""

    effective_rank: dict[str, list[float]]
    """Of each of WEIGHTS that there is; of each expert, where there are some."""
    coefficients: dict[str, float]
    """What the activation has learned, by title."""


@dataclass(frozen=True)
class Activity:
    """What the blocks do with some text."""

    tokens: int
    similarity: list[list[float]]
    """Mean over the tokens of the cosine between the hidden states after any two layers, the first being the
    embedding (paper, figure 7)."""
    constant: list[float]
    """By layer: share of the FFN's units that gave the same number for every token."""
    activation_rms: list[float]
    ffn_rms: list[float]


@dataclass(frozen=True)
class Study:
    """What is known of a checkpoint."""

    source: str
    activation: str
    full_rank: dict[str, int]
    """What the effective rank of each weight can be at most."""
    layers: list[Layer] = field(default_factory=list)
    activity: Activity | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Study:
        """The inverse of `as_json`. Raises PolycomError for what it has not made."""
        try:
            layers = [Layer(**layer) for layer in told["layers"]]
            activity = None if told["activity"] is None else Activity(**told["activity"])
            return cls(**{**told, "layers": layers, "activity": activity})
        except (KeyError, TypeError):
            raise PolycomError(f"no analysis of `polycom analyze`: {str(told)[:60]}") from None


def study(model: Model, tokens: Tensor | None, advance: Callable[[], object]) -> Study:
    """Read a model's FFNs, and run it over (sequences, length) tokens where they are given.

    Args:
        advance: called once a layer, and once more where there are tokens.
    """
    config = model.config
    ups = WEIGHTS if config["activation"]["gated"] else ("up", "down")
    size = min(config["hidden_size"], config["intermediate_size"])
    made = Study(model.source, config["activation"]["name"], dict.fromkeys(ups, size))
    for index in range(config["num_hidden_layers"]):
        inside = f"model.layers.{index}.mlp." + ("experts." if config["num_experts"] else "")
        end = "" if config["num_experts"] else ".weight"
        ranks = {
            name: effective_rank(model.tensors[f"{inside}{name}_proj{end}"]()).flatten().tolist()
            for name in ups
        }
        made.layers.append(Layer(ranks, _coefficients(model, f"{inside}act_fn.")))
        advance()
    if tokens is None:
        return made
    activity = _activity(model, tokens, advance)
    return Study(made.source, made.activation, made.full_rank, made.layers, activity)


def _coefficients(model: Model, prefix: str) -> dict[str, float]:
    told = model.config["activation"]
    order = f"-{told['order']}" if "order" in told else ""
    module = activations.build(
        told["name"] + order,
        width=model.config["intermediate_size"],
        hidden=model.config["hidden_size"],
    )
    names = [name for name, _ in module.named_parameters()]
    module.load_state_dict({name: model.tensors[prefix + name]() for name in names})
    return coefficients(module) if names else {}


def _activity(model: Model, tokens: Tensor, advance: Callable[[], object]) -> Activity:
    from polycom_ext.integrations.huggingface import layerwise

    def directions(hidden: Tensor) -> Tensor:
        return torch.nn.functional.normalize(hidden.flatten(0, -2), dim=-1)

    states, seen = [directions(layerwise.embedded(model, tokens))], []
    for layer in layerwise.layers(model, tokens):
        states.append(directions(layer.hidden))
        seen.append(layer)
        advance()
    similarity = [[float((one * other).sum(dim=-1).mean()) for other in states] for one in states]
    return Activity(
        tokens=tokens.numel(),
        similarity=similarity,
        constant=[layer.constant for layer in seen],
        activation_rms=[layer.activation_rms for layer in seen],
        ffn_rms=[layer.ffn_rms for layer in seen],
    )
