"""What a run spec says of model, batch and data, under the names that both trainers share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from polycom_ext.runs.spec import Spec

DATA_OPTIONS = ("data-path", "train-data-path")
"""Megatron's options that name training data: prefixes of indexed datasets, weights between them."""


@dataclass(frozen=True)
class Facts:
    """Model, batch and data of one run. None where the spec does not say (upstream's default holds then)."""

    layers: int | None
    hidden: int | None
    heads: int | None
    experts: int
    """Routed experts a block; 0 for a dense model."""
    active_experts: int | None
    sequence: int | None
    """Tokens in a sequence."""
    batch: int | None
    """Sequences in a global batch."""
    ffn_width: int | None
    """Ungated width, per expert where there are experts."""
    data: str

    @property
    def kind(self) -> str:
        """The section of published.yaml that this model belongs to."""
        return "moe" if self.experts else "dense"

    def tokens(self, steps: int) -> int | None:
        """Tokens seen in that many steps."""
        return None if self.sequence is None or self.batch is None else steps * self.batch * self.sequence


def of(spec: Spec) -> Facts:
    """Read them from a resolved spec."""
    return _megatron(spec) if spec.trainer == "megatron" else _olmo(spec)


def ffn_parameters(spec: Spec, facts: Facts) -> int | None:
    """Weights of all FFN matrices of the model, all experts included; None where the spec does not tell."""
    width = spec.matched_ffn_width
    if width is None or facts.hidden is None or facts.layers is None:
        return None
    matrices = 3 if spec.entry.gated else 2
    return facts.layers * max(1, facts.experts) * matrices * facts.hidden * width


def _megatron(spec: Spec) -> Facts:
    options = spec.options
    experts = _integer(options.get("num-experts")) or 0
    paths = [options[key] for key in DATA_OPTIONS if key in options]
    return Facts(
        layers=_integer(options.get("num-layers")),
        hidden=_integer(options.get("hidden-size")),
        heads=_integer(options.get("num-attention-heads")),
        experts=experts,
        active_experts=_integer(options.get("moe-router-topk")) if experts else None,
        sequence=_integer(options.get("seq-length")),
        batch=_integer(options.get("global-batch-size")),
        ffn_width=spec.ffn_width,
        data="mock data" if options.get("mock-data") else _names(paths),
    )


def _olmo(spec: Spec) -> Facts:
    options = spec.options
    model = options.get("model") or {}
    data = options.get("data") or {}
    experts = (_integer(model.get("moe_num_experts")) or 0) if model.get("block_type") == "moe" else 0
    return Facts(
        layers=_integer(model.get("n_layers")),
        hidden=_integer(model.get("d_model")),
        heads=_integer(model.get("n_heads")),
        experts=experts,
        active_experts=_integer(model.get("moe_top_k")) if experts else None,
        sequence=_integer(model.get("max_sequence_length")),
        batch=_integer(options.get("global_train_batch_size")),
        ffn_width=spec.ffn_width,
        data=_names([data.get("paths") or []]),
    )


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _names(values: Iterable[Any]) -> str:
    """The files with the folder that each lies in, without weights."""
    flat: list[str] = []
    for value in values:
        for part in value if isinstance(value, list) else str(value).split():
            name = "/".join(PurePath(str(part)).parts[-2:])
            if not _is_number(name) and name not in flat:
                flat.append(name)
    return ", ".join(flat[:4]) + (f" and {len(flat) - 4} more" if len(flat) > 4 else "")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
