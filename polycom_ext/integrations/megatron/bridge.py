"""PolyCom models for Megatron-Bridge: importing this file registers them with it, to be loaded and exported.

Names and layouts are the rows of table.py. Dense models alone: Megatron-Bridge looks for each expert's
tensor by a name of its own, and ours are stacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    ColumnParallelMapping,
    MegatronParamMapping,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.gpt import GPTModel

from polycom_ext.activations import REGISTRY
from polycom_ext.checkpoints.constants import KINDS, complete
from polycom_ext.checkpoints.model import Row
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron import architecture
from polycom_ext.integrations.megatron.table import AROUND, BLOCKS, QKV, Sharded, block_rows


@MegatronModelBridge.register_bridge(source="PolyComForCausalLM", target=GPTModel, model_type="polycom")
class PolyComBridge(MegatronModelBridge):
    """Between `PolyComForCausalLM` and a GPTModel of the patched Megatron-LM."""

    def provider_bridge(self, hf_pretrained: Any) -> GPTModelProvider:
        """What the model is. Raises PolycomError for what Megatron lacks, and for experts."""
        said = hf_pretrained.config
        config = {key: getattr(said, key) for key in (*KINDS, "initializer_range") if hasattr(said, key)}
        config.setdefault("rope_theta", (getattr(said, "rope_parameters", None) or {}).get("rope_theta"))
        complete(config, str(said.name_or_path))
        if config["num_experts"] or config["activation"]["gated"]:
            raise PolycomError(
                f"{said.name_or_path} has experts or a gate, which its bridge does not take over: "
                "`polycom convert … --to megatron` does"
            )
        arguments = vars(architecture.arguments(config))
        known = {one.name for one in fields(GPTModelProvider)}
        dtype = self.dtype_from_hf(said, default=torch.float32)
        return GPTModelProvider(
            **{name: value for name, value in arguments.items() if name in known},
            vocab_size=config["vocab_size"],
            share_embeddings_and_output_weights=config["tie_word_embeddings"],
            params_dtype=dtype,
            **{"fp16": dtype == torch.float16, "bf16": dtype == torch.bfloat16},
        )

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Of all rows that a dense model may have; those of the model's parameters are asked for."""
        return MegatronMappingRegistry(*map(_mapping, _rows()))


def _rows() -> Iterator[Row]:
    """By whole names, the block's number a wildcard."""
    yield from AROUND
    inside: dict[str, Row] = {}
    for entry in REGISTRY.values():
        if not entry.gated:
            described = {"num_experts": 0, "activation": {"name": entry.name, "gated": False}}
            inside |= {row.theirs: row for row in block_rows(described)}
    for row in inside.values():
        ours = tuple(f"model.layers.*.{name}" for name in row.ours)
        dim = {"dim": row.dim} if isinstance(row, Sharded) else {}
        yield type(row)(f"{BLOCKS}*.{row.theirs}", ours, row.layout, **dim)


def _mapping(row: Row) -> MegatronParamMapping[Any]:
    if row.layout is QKV:
        return QKVMapping(row.theirs, *row.ours)
    (ours,) = row.ours
    if not isinstance(row, Sharded):
        return ReplicatedMapping(row.theirs, ours)
    return (ColumnParallelMapping, RowParallelMapping)[row.dim](row.theirs, ours)
