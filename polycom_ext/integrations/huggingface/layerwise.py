"""A model's forward pass with one block in memory at a time, and what its FFNs do on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from polycom_ext.checkpoints.model import Model
from polycom_ext.integrations.huggingface.configuration_polycom import PolyComConfig
from polycom_ext.integrations.huggingface.modeling_polycom import PolyComDecoderLayer


@dataclass(frozen=True)
class Layer:
    """What a block has done."""

    hidden: Tensor
    """(sequences, length, hidden): its output, the residual stream."""
    constant: float
    """Share of the FFN's units that gave the same number for every token, such as those of a ReLU that is
    never reached; of experts among those that got two tokens or more."""
    activation_rms: float
    """Of what the activation gives."""
    ffn_rms: float
    """Of what the FFN adds to the residual stream."""
    hidden_rms: float
    """Of the residual stream behind the block."""
    row: tuple[Tensor, Tensor] | None
    """(width,) inputs of the activation and what it made of them: the row whose rms is the median of all, of
    experts of each one's median row the nearest to that. None of a gated activation."""


def embedded(model: Model, tokens: Tensor) -> Tensor:
    """(sequences, length) ids -> (sequences, length, hidden), float32."""
    return nn.functional.embedding(tokens, model.tensors["model.embed_tokens.weight"]()).float()


def layers(model: Model, tokens: Tensor) -> Iterator[Layer]:
    """Each block's work on the tokens, in float32 on the CPU, its weights read when it is its turn."""
    config = PolyComConfig(**model.config, attn_implementation="sdpa")
    hidden = embedded(model, tokens)
    positions = torch.arange(tokens.shape[1])[None]
    turned = LlamaRotaryEmbedding(config)(hidden, positions)
    for index in range(config.num_hidden_layers):
        block = _block(model, config, index)
        seen = _Seen(block)
        with torch.inference_mode():
            hidden = block(hidden, attention_mask=None, position_ids=positions, position_embeddings=turned)
        del block  # before the next one is read
        yield seen.layer(hidden)


def _block(model: Model, config: PolyComConfig, index: int) -> nn.Module:
    prefix = f"model.layers.{index}."
    with torch.device("meta"):
        block = PolyComDecoderLayer(config, index).eval()
    weights = {name: model.tensors[prefix + name]().float() for name in block.state_dict()}
    block.load_state_dict(weights, assign=True)
    return block


class _Rms:
    """Of numbers that come in parts."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, values: Tensor) -> None:
        self._sum += float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
        self._count += values.numel()

    def value(self) -> float:
        return (self._sum / self._count) ** 0.5 if self._count else 0.0


class _Row:
    """The typical one of rows that come in parts."""

    def __init__(self) -> None:
        self._sizes: list[Tensor] = []
        self._kept: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

    def add(self, given: Tensor, made: Tensor) -> None:
        sizes = torch.linalg.vector_norm(given, dim=-1, dtype=torch.float64)
        middle = sizes.median(dim=0)
        self._sizes.append(sizes)
        self._kept.append((middle.values, (given[middle.indices].clone(), made[middle.indices].clone())))

    def value(self) -> tuple[Tensor, Tensor] | None:
        if not self._kept:
            return None
        middle = torch.cat(self._sizes).median()
        return min(self._kept, key=lambda kept: float((kept[0] - middle).abs()))[1]


class _Seen:
    """Hears what a block's activation and FFN give; an expert is one call of the activation."""

    def __init__(self, block: nn.Module) -> None:
        self._activation, self._ffn, self._row = _Rms(), _Rms(), _Row()
        self._constant = self._units = 0
        mlp = block.get_submodule("mlp")
        act_fn = mlp.get_submodule("experts.act_fn" if hasattr(mlp, "experts") else "act_fn")
        act_fn.register_forward_hook(self._hear_activation)
        mlp.register_forward_hook(self._hear_ffn)

    def _hear_ffn(self, module: nn.Module, given: tuple[Tensor], result: Tensor) -> None:
        self._ffn.add(result)

    def _hear_activation(self, module: nn.Module, given: tuple[Tensor], result: Tensor) -> None:
        self._activation.add(result)
        inputs, rows = given[0].flatten(0, -2), result.flatten(0, -2)
        if inputs.shape == rows.shape:
            self._row.add(inputs, rows)
        if len(rows) > 1:
            self._constant += int((rows.amax(dim=0) == rows.amin(dim=0)).sum())
            self._units += rows.shape[-1]

    def layer(self, hidden: Tensor) -> Layer:
        stream = _Rms()
        stream.add(hidden)
        constant = self._constant / self._units if self._units else 0.0
        return Layer(
            hidden, constant, self._activation.value(), self._ffn.value(), stream.value(), self._row.value()
        )
