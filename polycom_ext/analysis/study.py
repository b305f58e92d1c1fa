"""A checkpoint studied layer by layer; one layer's weights are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from polycom_ext.analysis.history import Moment
from polycom_ext.analysis.learned import activation, inside, learned
from polycom_ext.analysis.shapes import Shape, on_normal_row, on_row
from polycom_ext.analysis.spectrum import effective_rank
from polycom_ext.checkpoints.model import Model
from polycom_ext.errors import PolycomError

WEIGHTS = ("up", "gate", "down")
"""An FFN's linear layers, of which only a gated one has the second."""


@dataclass(frozen=True)
class Layer:
    """One block."""

    effective_rank: dict[str, list[float]]
    """Of each of WEIGHTS that there is; of each expert, where there are some."""
    coefficients: dict[str, float]
    """What the activation has learned, by title."""
    shape: Shape | None
    """What function that makes of a row of standard normal numbers; None of a gated one, which takes two."""


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
    """Of what the activation gives."""
    ffn_rms: list[float]
    """Of what the FFN adds to the residual stream."""
    hidden_rms: list[float]
    """Of the residual stream behind the layer."""
    shapes: list[Shape | None]
    """Of each layer's activation, on the row of inputs whose rms is the median of all."""


@dataclass(frozen=True)
class Study:
    """What is known of a checkpoint."""

    source: str
    activation: str
    full_rank: dict[str, int]
    """What the effective rank of each weight can be at most."""
    layers: list[Layer] = field(default_factory=list)
    activity: Activity | None = None
    history: list[Moment] = field(default_factory=list)
    """What had been learned at each checkpoint of the run; nothing of a checkpoint alone."""

    @property
    def shapes(self) -> list[Shape | None]:
        """Of each layer's activation, on the inputs that it has where some text was seen."""
        return [layer.shape for layer in self.layers] if self.activity is None else self.activity.shapes

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Study:
        """The inverse of `as_json`. Raises PolycomError for what it has not made."""
        try:
            layers = [Layer(**{**layer, "shape": _shape(layer["shape"])}) for layer in told["layers"]]
            activity = None if told["activity"] is None else _seen(told["activity"])
            history = [Moment(**moment) for moment in told["history"]]
            return cls(**{**told, "layers": layers, "activity": activity, "history": history})
        except (KeyError, TypeError):
            raise PolycomError(f"no analysis of `polycom analyze`: {str(told)[:60]}") from None


def _shape(told: dict[str, Any] | None) -> Shape | None:
    return None if told is None else Shape(**told)


def _seen(told: dict[str, Any]) -> Activity:
    return Activity(**{**told, "shapes": [_shape(one) for one in told["shapes"]]})


def study(
    model: Model, tokens: Tensor | None, advance: Callable[[], object], history: list[Moment] | None = None
) -> Study:
    """Read a model's FFNs, and run it over (sequences, length) tokens where they are given.

    Args:
        advance: called once a layer, and once more where there are tokens.
        history: of the run whose newest checkpoint the model is.
    """
    config = model.config
    gated, width = config["activation"]["gated"], config["intermediate_size"]
    names = WEIGHTS if gated else ("up", "down")
    full = dict.fromkeys(names, min(config["hidden_size"], width))
    end = "" if config["num_experts"] else ".weight"
    layers, module = [], activation(model)
    for index in range(config["num_hidden_layers"]):
        prefix = inside(model, index)
        ranks = {
            name: effective_rank(model.tensors[f"{prefix}{name}_proj{end}"]()).flatten().tolist()
            for name in names
        }
        coefficients = learned(model, module, index)
        layers.append(Layer(ranks, coefficients, None if gated else on_normal_row(module, width)))
        advance()
    activity = None if tokens is None else _activity(model, tokens, advance)
    return Study(model.source, config["activation"]["name"], full, layers, activity, history or [])


def _activity(model: Model, tokens: Tensor, advance: Callable[[], object]) -> Activity:
    from polycom_ext.integrations.huggingface import layerwise

    def directions(hidden: Tensor) -> Tensor:
        return torch.nn.functional.normalize(hidden.flatten(0, -2), dim=-1)

    made = Activity(tokens.numel(), [], [], [], [], [], [])
    states = [directions(layerwise.embedded(model, tokens))]
    for layer in layerwise.layers(model, tokens):
        states.append(directions(layer.hidden))
        made.constant.append(layer.constant)
        made.activation_rms.append(layer.activation_rms)
        made.ffn_rms.append(layer.ffn_rms)
        made.hidden_rms.append(layer.hidden_rms)
        made.shapes.append(None if layer.row is None else on_row(*layer.row))
        advance()
    made.similarity.extend([float((one * other).sum(dim=-1).mean()) for other in states] for one in states)
    return made
