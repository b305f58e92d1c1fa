"""A run's options as numbers, with upstream's defaults: what `layout.py` lays out, read without Megatron."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polycom_ext import activations
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron.native import FLAGS
from polycom_ext.runs.layout import Block, Factor
from polycom_ext.runs.spec import Spec

DEFAULTS: dict[str, Any] = {
    "tensor-model-parallel-size": 1,
    "pipeline-model-parallel-size": 1,
    "context-parallel-size": 1,
    "expert-model-parallel-size": 1,
    "make-vocab-size-divisible-by": 128,
    "num-query-groups": 1,
    "moe-router-topk": 2,
    "moe-layer-freq": "1",
    "hidden-dropout": 0.1,
    "attention-dropout": 0.1,
    "normalization": "LayerNorm",
    "position-embedding-type": "learned_absolute",
    "transformer-impl": "transformer_engine",
    "moe-token-dispatcher-type": "allgather",
    "cross-entropy-fusion-impl": "native",
    "optimizer": "adam",
    "main-grads-dtype": "fp32",
    "cpu-offloading-num-layers": 0,
    "num-distributed-optimizer-instances": 1,
    "moe-router-score-function": "softmax",
}
"""Upstream's defaults of what is read here and is not None or false."""

BEYOND = (
    *("multi-latent-attention", "experimental-attention-variant", "attention-output-gate", "mtp-num-layers"),
    *("hybrid-layer-pattern", "hybrid-override-pattern", "is-hybrid-model", "spec"),
    *("heterogeneous-layers-config-path", "heterogeneous-layers-config-encoded-json", "moe-latent-size"),
    *("fp8-format", "fp4-format", "use-megatron-fsdp", "use-torch-fsdp2", "use-precision-aware-optimizer"),
    *("optimizer-cpu-offload", "fine-grained-activation-offloading", "pipeline-model-parallel-layout"),
    *("hybrid-context-parallel", "moe-expert-capacity-factor", "quick-geglu", "fp32-residual-connection"),
)
"""Options whose effect on memory is not reckoned: with one of them a plan would be wrong."""
ONLY: dict[str, tuple[Any, ...]] = {
    "optimizer": ("adam",),
    "cpu-offloading-num-layers": (0,),
    "num-distributed-optimizer-instances": (1,),
    "main-grads-dtype": ("fp32",),
    "position-embedding-type": ("rope", "learned_absolute", "none"),
    "transformer-impl": ("local", "transformer_engine"),
}
"""Options of which only these values are reckoned."""


@dataclass(frozen=True)
class Sizes:
    """The spec's options; `name`s are upstream's."""

    spec: Spec
    given: Mapping[str, Any]
    """With the activation and the widths in upstream's terms."""

    def __post_init__(self) -> None:
        where = f"{self.spec.name}: `polycom plan` does not reckon megatron."
        for name in BEYOND:
            if self[name]:
                raise PolycomError(f"{where}{name}: leave it out by --set megatron.{name}=null")
        for name, allowed in ONLY.items():
            if self[name] not in allowed:
                known = ", ".join(map(str, allowed))
                raise PolycomError(f"{where}{name} {self[name]}, but only {known}")
        every = str(self["moe-layer-freq"])
        if not every.isdigit() or every == "0":
            raise PolycomError(f"{where}moe-layer-freq {every}, but only a number from 1 up")

    def __getitem__(self, name: str) -> Any:
        value = self.given.get(name)
        return DEFAULTS.get(name) if value is None else value

    def count(self, name: str) -> int:
        """An option that must be there, a whole number."""
        value = self[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PolycomError(
                f"{self.spec.name}: a plan needs megatron.{name}, a whole number, not {value!r}"
            )
        return value

    @property
    def tensor(self) -> int:
        return self.count("tensor-model-parallel-size")

    @property
    def pipeline(self) -> int:
        return self.count("pipeline-model-parallel-size")

    @property
    def context(self) -> int:
        return self.count("context-parallel-size")

    @property
    def expert(self) -> int:
        return self.count("expert-model-parallel-size")

    @property
    def expert_tensor(self) -> int:
        return self["expert-tensor-parallel-size"] or self.tensor

    @property
    def replicas(self) -> int:
        """Data-parallel ranks, of which each takes other sequences."""
        return self.spec.world_size // (self.tensor * self.pipeline * self.context)

    @property
    def expert_replicas(self) -> int:
        return self.spec.world_size // (self.expert_tensor * self.expert * self.pipeline)

    @property
    def sequence_parallel(self) -> bool:
        """Upstream switches it off without tensor parallelism."""
        return bool(self["sequence-parallel"]) and self.tensor > 1

    @property
    def share(self) -> Factor:
        """By which tokens are divided between the linear layers under sequence parallelism."""
        return (self.tensor if self.sequence_parallel else 1, "tensor ranks")

    @property
    def micro(self) -> int:
        return self.count("micro-batch-size")

    @property
    def batch(self) -> int:
        return self["global-batch-size"] or self.micro * self.replicas

    @property
    def micro_batches(self) -> int:
        return self.batch // (self.micro * self.replicas)

    @property
    def sequence(self) -> int:
        return self.count("seq-length")

    @property
    def stored(self) -> int:
        """Bytes of a parameter, and of an element of an activation."""
        return 2 if self["bf16"] or self["fp16"] else 4

    @property
    def gradient(self) -> int:
        """Bytes of an accumulated gradient: float32 of bf16 unless told otherwise, of fp16 if told."""
        if self["bf16"]:
            return 2 if self["grad-reduce-in-bf16"] else 4
        return self.stored if self["fp16"] and not self["accumulate-allreduce-grads-in-fp32"] else 4

    @property
    def local(self) -> bool:
        """On Megatron's own layers, not Transformer Engine's."""
        return bool(self["transformer-impl"] == "local")

    @property
    def biases(self) -> bool:
        return not self["disable-bias-linear"]

    @property
    def norm(self) -> int:
        """Vectors of a norm."""
        return 1 if self["normalization"] == "RMSNorm" else 2

    @property
    def heads(self) -> int:
        return self.count("num-attention-heads")

    @property
    def groups(self) -> int:
        return self.count("num-query-groups") if self["group-query-attention"] else self.heads

    @property
    def head(self) -> int:
        return self["kv-channels"] or self.count("hidden-size") // self.heads

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: upstream pads them, to a multiple that grows with tensor parallelism."""
        if self["padded-vocab-size"]:
            return self.count("padded-vocab-size")
        if self["tokenizer-type"] != "NullTokenizer":
            raise PolycomError(
                f"{self.spec.name}: the plan does not read the tokenizer: say how many embeddings there are "
                "by --set megatron.padded-vocab-size=N"
            )
        multiple = self.count("make-vocab-size-divisible-by") * self.tensor
        return math.ceil((self.count("vocab-size") + 1) / multiple) * multiple

    @property
    def block(self) -> Block:
        """The layers' sizes, as all trainers share them."""
        entry, order = activations.parse(self.spec.activation)
        experts = self["num-experts"] or 0
        width = self["ffn-hidden-size"] or self._default_width()
        return Block(
            hidden=self.count("hidden-size"),
            queries=self.heads * self.head,
            keys=self.groups * self.head,
            width=(self["moe-ffn-hidden-size"] or width) if experts else width,
            matrices=3 if self["swiglu"] else 2,
            coefficients=entry.parameters(order) if entry.name not in FLAGS else 0,
            experts=experts,
            chosen=self.count("moe-router-topk") if experts else 0,
            shared=self["moe-shared-expert-intermediate-size"] or 0,
        )

    def _default_width(self) -> int:
        hidden = self.count("hidden-size")
        return int((4 * hidden * 2 / 3) / 64) * 64 if self["swiglu"] else 4 * hidden

    @property
    def dense_width(self) -> int:
        """Of the FFN of a layer that is no mixture."""
        return int(self["ffn-hidden-size"] or self._default_width())

    def of_experts(self) -> list[bool]:
        """For each layer whether it is a mixture."""
        every = int(self["moe-layer-freq"])
        mixtures = bool(self["num-experts"])
        return [mixtures and layer % every == 0 for layer in range(self.count("num-layers"))]

    @property
    def chunks(self) -> int:
        """Virtual stages of a pipeline rank."""
        if self.pipeline == 1:
            return 1
        if self["num-virtual-stages-per-pipeline-rank"]:
            return self.count("num-virtual-stages-per-pipeline-rank")
        each = self["num-layers-per-virtual-pipeline-stage"]
        layers = self.count("num-layers") + self._extra_first + self._extra_last
        return max(1, layers // self.pipeline // each) if each else 1

    @property
    def _extra_first(self) -> int:
        return int(bool(self["account-for-embedding-in-pipeline-split"]))

    @property
    def _extra_last(self) -> int:
        return int(bool(self["account-for-loss-in-pipeline-split"]))

    def stages(self) -> list[list[bool]]:
        """For each pipeline rank whether each of its layers is a mixture, chunk by chunk."""
        kinds, parts = self.of_experts(), self.pipeline * self.chunks
        first, last = self["decoder-first-pipeline-num-layers"], self["decoder-last-pipeline-num-layers"]
        if (first or last) and self.chunks == 1:
            middle = parts - (first is not None) - (last is not None)
            each = (len(kinds) - (first or 0) - (last or 0)) // max(1, middle)
            counts = [each] * parts
            counts[0], counts[-1] = first or each, last or each
        else:
            each = (len(kinds) + self._extra_first + self._extra_last) // parts
            counts = [each] * parts
            counts[0] -= self._extra_first
            counts[-1] -= self._extra_last
        if sum(counts) != len(kinds) or min(counts) < 0:
            raise PolycomError(
                f"{self.spec.name}: {len(kinds)} layers do not divide over {parts} pipeline stages"
            )
        ranks: list[list[bool]] = [[] for _ in range(self.pipeline)]
        at = 0
        for part, count in enumerate(counts):
            ranks[part % self.pipeline] += kinds[at : at + count]
            at += count
        return ranks

    def recomputes(self, module: str) -> bool:
        """Whether that part of a layer is recomputed by itself; by default the attention's core."""
        granularity = self["recompute-granularity"] or (
            "selective" if self["recompute-activations"] else None
        )
        named = self["recompute-modules"] or ["core_attn"]
        return granularity == "selective" and module in (named if isinstance(named, list) else [named])

    @property
    def recomputed_whole(self) -> bool:
        return bool(self["recompute-granularity"] == "full")
