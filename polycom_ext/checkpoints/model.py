"""A language model apart from any trainer, and the tables by which trainers' checkpoints become one.

Names and shapes are those of transformers' Llama and of integrations/huggingface: the form in which models
are exchanged. A trainer's checkpoint is described by rows: a name of theirs, the names that it becomes, and
the layout of several of ours in one of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from polycom_ext.checkpoints.constants import complete
from polycom_ext.errors import PolycomError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Model:
    """What a model is, and its tensors, each of which is read when it is asked for."""

    config: dict[str, Any]
    """As a PolyCom model's config.json: every constant that fixes the function."""
    tensors: Mapping[str, Callable[[], Tensor]]
    """Our name -> how to read it; in the order in which they are written."""
    source: str
    """Where it comes from, for the record of a conversion."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Name -> what goes with the model as it is: its tokenizer, how it generates."""


class Layout(Protocol):
    """How one tensor of theirs holds several of ours."""

    def split(self, tensor: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Theirs -> ours."""

    def join(self, tensors: tuple[Tensor, ...], config: Mapping[str, Any]) -> Tensor:
        """Ours -> theirs, the inverse."""


class Same:
    """One tensor is one tensor."""

    def split(self, tensor: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return (tensor,)

    def join(self, tensors: tuple[Tensor, ...], config: Mapping[str, Any]) -> Tensor:
        (tensor,) = tensors
        return tensor


@dataclass(frozen=True)
class Concatenated:
    """Several tensors of the same shape one behind the other along a dimension, counted from the end."""

    dim: int
    count: int = 2

    def split(self, tensor: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return tuple(part.contiguous() for part in tensor.chunk(self.count, dim=self.dim))

    def join(self, tensors: tuple[Tensor, ...], config: Mapping[str, Any]) -> Tensor:
        import torch

        return torch.cat(tensors, dim=self.dim)


class GroupedQKV:
    """Per group of heads that share keys: its queries, its key, its value, along the first dimension."""

    def split(self, tensor: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, ...]:
        groups, dim = config["num_key_value_heads"], config["head_dim"]
        queries = config["num_attention_heads"] // groups
        if tensor.shape[0] != groups * (queries + 2) * dim:
            raise PolycomError(
                f"queries, keys and values have {tensor.shape[0]} rows, and {groups} groups of {queries} + 2 "
                f"heads of {dim} need {groups * (queries + 2) * dim}"
            )
        grouped = tensor.unflatten(0, (groups, queries + 2, dim))
        parts = grouped.split((queries, 1, 1), dim=1)
        return tuple(part.flatten(0, 2).contiguous() for part in parts)

    def join(self, tensors: tuple[Tensor, ...], config: Mapping[str, Any]) -> Tensor:
        import torch

        groups, dim = config["num_key_value_heads"], config["head_dim"]
        parts = [tensor.unflatten(0, (groups, -1, dim)) for tensor in tensors]
        return torch.cat(parts, dim=1).flatten(0, 2).contiguous()


SAME = Same()


@dataclass(frozen=True)
class Row:
    """One line of a trainer's table."""

    theirs: str
    ours: tuple[str, ...]
    layout: Layout = SAME

    def read(self, read: Callable[[], Tensor], config: Mapping[str, Any]) -> dict[str, Callable[[], Tensor]]:
        """Our names -> how to read them; those of one row are read together, and the last is kept."""
        kept: dict[str, Tensor] = {}

        def take(name: str) -> Tensor:
            if name not in kept:
                kept.clear()
                kept.update(zip(self.ours, self.layout.split(read(), config), strict=True))
            return kept.pop(name)

        def reader(name: str) -> Callable[[], Tensor]:
            return lambda: take(name)

        return {name: reader(name) for name in self.ours}

    def write(self, tensors: Mapping[str, Callable[[], Tensor]], config: Mapping[str, Any]) -> Tensor:
        """Theirs, from ours."""
        return self.layout.join(tuple(tensors[name]() for name in self.ours), config)


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Our name -> shape, of every tensor that a model of this configuration has."""
    from polycom_ext import activations

    hidden, width, dim = (config[key] for key in ("hidden_size", "intermediate_size", "head_dim"))
    heads, groups, experts = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "num_experts")
    )
    activation = config["activation"]
    order = f"-{activation['order']}" if "order" in activation else ""
    coefficients = activations.build(activation["name"] + order, width=width, hidden=hidden, device="meta")

    def linear(name: str, out: int, into: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (out, into)
        if bias:
            yield f"{name}.bias", (out,)

    def norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        if config["norm"]["affine"]:
            yield f"{name}.weight", (hidden,)
            if config["norm"]["bias"]:
                yield f"{name}.bias", (hidden,)

    def one_block() -> Iterator[tuple[str, tuple[int, ...]]]:
        if not config["norm_after"]:
            yield from norm("input_layernorm")
        for letter, count in (("q", heads), ("k", groups), ("v", groups)):
            name = f"self_attn.{letter}_proj"
            yield from linear(name, count * dim, hidden, config["attention_bias"])
            if config["qk_norm"] and letter != "v":
                yield f"{name}.norm.weight", (dim if config["qk_norm"] == "head" else count * dim,)
        yield from linear("self_attn.o_proj", hidden, heads * dim, config["attention_bias"])
        yield from norm("post_attention_layernorm")
        ups = ("gate_proj", "up_proj") if activation["gated"] else ("up_proj",)
        inside = "mlp.experts." if experts else "mlp."
        if experts:
            yield "mlp.gate.weight", (experts, hidden)
            yield from ((inside + up, (experts, width, hidden)) for up in ups)
            yield inside + "down_proj", (experts, hidden, width)
        else:
            for up in ups:
                yield from linear(inside + up, width, hidden, config["mlp_bias"])
            yield from linear(inside + "down_proj", hidden, width, config["mlp_bias"])
        for name, parameter in coefficients.named_parameters():
            yield f"{inside}act_fn.{name}", tuple(parameter.shape)
        if config["norm_after"]:
            yield from norm("post_feedforward_layernorm")

    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        found.update((f"model.layers.{layer}.{name}", shape) for name, shape in one_block())
    found.update(norm("model.norm"))
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    return found


def check_layers(config: Mapping[str, Any], held: int, source: str) -> None:
    """Raise PolycomError where there are more blocks than tensors: nobody is to wait for all their names."""
    if config["num_hidden_layers"] > held:
        raise PolycomError(f"{source} says {config['num_hidden_layers']} layers, and holds {held} tensors")


def checked(model: Model) -> Model:
    """The model, its tensors in the order of its blocks, each compared with its shape when it is read.

    Raises PolycomError, at once or from what reads a tensor, where a constant is missing, and where a tensor
    is missing, left over or of another shape.
    """
    complete(model.config, model.source)
    check_layers(model.config, len(model.tensors), model.source)
    expected = shapes(model.config)
    missing, left = expected.keys() - model.tensors.keys(), model.tensors.keys() - expected.keys()
    if missing:
        raise PolycomError(f"{model.source} has nothing for {min(missing)} ({len(missing)} such)")
    if left:
        raise PolycomError(f"{model.source} holds {min(left)}, which such a model does not have")

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            tensor = model.tensors[name]()
            if tuple(tensor.shape) != expected[name]:
                found = tuple(tensor.shape)
                raise PolycomError(
                    f"{model.source}: {name} has shape {found}, the model needs {expected[name]}"
                )
            return tensor

        return read

    return Model(model.config, {name: reader(name) for name in expected}, model.source, model.files)
