"""What a rehearsal of a Megatron run keeps and what it shrinks, as changes to the spec.

Kept: the parallel sizes, what is recomputed, the stages of the pipeline, kinds of layers, norms and router,
the proportions of widths, heads, experts and batch, the shape of the schedule. Options that none of the
functions below names stay as they are.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron import blends, checks
from polycom_ext.runs import rehearse, shrinking
from polycom_ext.runs.adapter import StandIn, integer
from polycom_ext.runs.shrinking import INTERVAL, STEPS, positive
from polycom_ext.runs.spec import Spec

OF_GPUS = (
    *("fp8-", "fp4-", "cuda-graph-", "enable-cuda-graph", "external-cuda-graph", "te-", "tp-comm-overlap"),
    *("use-precision-aware-optimizer", "main-grads-dtype", "main-params-dtype", "exp-avg-"),
    *("attention-backend", "cross-entropy-", "moe-grouped-gemm", "moe-permute-fusion", "moe-router-fusion"),
    *("moe-enable-deepep", "moe-flex-dispatcher-backend", "use-nccl-ub", "nccl-communicator-config-path"),
    *("overlap-param-gather", "overlap-grad-reduce", "async-save", "use-transformer-engine-op-fuser"),
)
"""What options begin with that a CPU has no kernel for, or nothing to overlap with."""
BY_LAYER = (
    *checks.UNEVEN_PIPELINE,
    *(
        "heterogeneous-layers-config-path",
        "heterogeneous-layers-config-encoded-json",
        "num-layers-at-start-in-bf16",
    ),
    *("num-layers-at-end-in-bf16", "hybrid-override-pattern", "linear-attention-freq"),
)
"""Options that speak of single layers: with one of them none is taken away."""
OF_THE_RUN = (
    *("wandb-project", "wandb-entity", "wandb-exp-name", "wandb-save-dir", "tensorboard-dir"),
    *("pretrained-checkpoint", "use-checkpoint-args", "finetune", "exit-interval", "rampup-batch-size"),
)
"""What is of the run itself: where it is followed, what it starts from, when it stops for a while."""
OF_ITS_TOKENS = (
    *(
        *blends.OPTIONS,
        *blends.FILE_OPTIONS,
        "split",
        "per-dataset-sequences-path",
        "object-storage-cache-path",
    ),
    *("tokenizer-model", "vocab-file", "merge-file", "tokenizer-metadata", "padded-vocab-size", "fim-data"),
)
INTERVALS = ("save-interval", "eval-interval", "save-retain-interval", "non-persistent-save-interval")


def changes(spec: Spec, data: StandIn, on_gpus: bool) -> dict[str, Any]:
    """See `Adapter.rehearsal`."""
    layout = _Layout(spec)
    options = {
        **dict.fromkeys(name for name in OF_THE_RUN if name in spec.options),
        **_tokens(spec, data),
        **_layers(spec, layout),
        **_experts(spec, layout),
        **_sequence(spec, layout),
    }
    ffn, widths = _widths(spec, layout)
    batch = _batch(spec, layout)
    options |= {**widths, **batch, **_schedule(spec, batch), **_intervals(spec)}
    result = {"nodes": 1, "processes_per_node": layout.model * layout.replicas}
    if ffn is not None:
        result["ffn_width"] = ffn
    result |= {f"megatron.{name}": value for name, value in options.items()}
    return result if on_gpus else {**result, **_on_a_cpu(spec, layout)}


class _Layout:
    """Sizes that stay, and the copies of the model that are left."""

    def __init__(self, spec: Spec) -> None:
        def size(name: str, default: int = 1) -> int:
            return checks.integer(spec, name, None) or default

        self.tensor = size("tensor-model-parallel-size")
        self.pipeline = size("pipeline-model-parallel-size")
        self.context = size("context-parallel-size")
        self.expert = size("expert-model-parallel-size")
        self.expert_tensor = size("expert-tensor-parallel-size", self.tensor)
        self.layers = size("num-layers", 0)
        a_stage = size("num-layers-per-virtual-pipeline-stage", 0)
        given = size("num-virtual-stages-per-pipeline-rank", 1)
        self.virtual = max(1, self.layers // (self.pipeline * a_stage)) if a_stage else given
        self.model = self.tensor * self.pipeline * self.context
        self.copies = max(1, spec.world_size // self.model)
        instances = size("num-distributed-optimizer-instances")
        experts = self.expert_tensor * self.expert * self.pipeline if spec.options.get("num-experts") else 1
        self.replicas = shrinking.replicas(
            self.copies, lambda count: self.model * count % experts == 0 and count % instances == 0
        )


def _layers(spec: Spec, layout: _Layout) -> dict[str, Any]:
    stages = layout.pipeline * layout.virtual
    period = spec.options.get("moe-layer-freq", 1)
    if not layout.layers or any(spec.options.get(name) for name in BY_LAYER) or positive(period) is None:
        return {}
    count = shrinking.layers(layout.layers, math.lcm(stages, max(1, period)))
    a_stage = count // stages
    made: dict[str, Any] = {"num-layers": count}
    if "num-layers-per-virtual-pipeline-stage" in spec.options:
        made["num-layers-per-virtual-pipeline-stage"] = a_stage
    if recomputed := positive(spec.options.get("recompute-num-layers")):
        made["recompute-num-layers"] = min(recomputed, a_stage)
    return made


def _widths(spec: Spec, layout: _Layout) -> tuple[int | None, dict[str, Any]]:
    """The spec's `ffn_width`, where it has one, and the options of widths and heads."""
    given = spec.options
    hidden, heads = positive(given.get("hidden-size")), positive(given.get("num-attention-heads"))
    if hidden is None or heads is None:
        return spec.ffn_width, {}
    groups = positive(given.get("num-query-groups")) or heads
    fewer, fewer_groups = shrinking.heads(heads, groups, layout.tensor * layout.context)
    ffn = spec.ffn_width or positive(given.get("ffn-hidden-size")) or 4 * hidden
    unit = math.lcm(layout.tensor, layout.expert_tensor) * (3 if ffn % 3 == 0 else 1)
    width, ffn = shrinking.widths(hidden, ffn, heads, fewer, unit)
    made: dict[str, Any] = {"hidden-size": width, "num-attention-heads": fewer}
    if "num-query-groups" in given:
        made["num-query-groups"] = fewer_groups
    if channels := positive(given.get("kv-channels")):
        made["kv-channels"] = shrinking.nearest(Fraction(channels * width * heads, hidden * fewer), 2)
    for name in (
        "ffn-hidden-size",
        "moe-ffn-hidden-size",
        "moe-shared-expert-intermediate-size",
        "moe-latent-size",
    ):
        if old := positive(given.get(name)):
            made[name] = (
                ffn if name == "ffn-hidden-size" else shrinking.nearest(Fraction(old * width, hidden), unit)
            )
    return (None if spec.ffn_width is None else ffn), made


def _experts(spec: Spec, layout: _Layout) -> dict[str, Any]:
    count, chosen = (
        positive(spec.options.get("num-experts")),
        positive(spec.options.get("moe-router-topk")) or 2,
    )
    if count is None or spec.options.get("moe-router-num-groups"):
        return {}
    fewer, chosen = shrinking.experts(count, chosen, layout.expert)
    return {"num-experts": fewer, "moe-router-topk": chosen}


def _sequence(spec: Spec, layout: _Layout) -> dict[str, Any]:
    length, most = (
        positive(spec.options.get("seq-length")),
        positive(spec.options.get("max-position-embeddings")),
    )
    if length is None:
        return {}
    shorter = shrinking.sequence(length, 2 * layout.tensor * layout.context)
    made: dict[str, Any] = {"seq-length": shorter}
    if most is not None:
        made["max-position-embeddings"] = math.ceil(Fraction(most * shorter, length))
    return made


def _batch(spec: Spec, layout: _Layout) -> dict[str, Any]:
    micro, batch = (
        positive(spec.options.get("micro-batch-size")),
        positive(spec.options.get("global-batch-size")),
    )
    if micro is None or batch is None:
        return {}
    group = positive(spec.options.get("microbatch-group-size-per-virtual-pipeline-stage")) or layout.pipeline
    accumulated = max(1, batch // (micro * layout.copies))
    micro, accumulated = shrinking.batch(micro, accumulated, group)
    return {"micro-batch-size": micro, "global-batch-size": micro * accumulated * layout.replicas}


def _schedule(spec: Spec, batch: dict[str, Any]) -> dict[str, Any]:
    """The length, and what counts in its unit as the share of it that it was."""
    made: dict[str, Any] = {}
    for unit, a_step in (("iters", 1), ("samples", batch.get("global-batch-size", 1))):
        length = positive(spec.options.get(f"train-{unit}"))
        if length is None:
            continue
        shorter = made[f"train-{unit}"] = STEPS * a_step
        for name in (f"lr-decay-{unit}", f"lr-wsd-decay-{unit}", f"lr-warmup-{unit}"):
            part = integer(spec.options.get(name))
            if part is not None:
                made[name] = shrinking.share(part, length, shorter)
        if f"lr-warmup-{unit}" in made:
            end = made.get(f"lr-decay-{unit}", shorter)
            made[f"lr-warmup-{unit}"] = min(made[f"lr-warmup-{unit}"], end - 1)
    return made


def _intervals(spec: Spec) -> dict[str, Any]:
    made: dict[str, Any] = {"log-interval": 1, "tensorboard-log-interval": 1, "eval-interval": INTERVAL}
    made |= {name: INTERVAL for name in INTERVALS if name in spec.options}
    batches = integer(spec.options.get("eval-iters"))
    return {**made, "eval-iters": 2 if batches is None else min(batches, 2)}


def _tokens(spec: Spec, data: StandIn) -> dict[str, Any]:
    """The stand-in's files and vocabulary; NullTokenizer adds the token that ends documents."""
    made: dict[str, Any] = {
        **dict.fromkeys(name for name in OF_ITS_TOKENS if name in spec.options),
        "tokenizer-type": "NullTokenizer",
        "vocab-size": data.vocabulary - 1,
    }
    if spec.options.get("mock-data"):
        return made
    made |= {"train-data-path": [data.train], "valid-data-path": [data.valid]}
    if "test-data-path" in spec.options:
        made["test-data-path"] = [data.valid]
    return {**made, "data-cache-path": str(data.folder / "cache")}


def _on_a_cpu(spec: Spec, layout: _Layout) -> dict[str, Any]:
    if layout.context > 1:
        raise PolycomError(
            f"{spec.name}: megatron.context-parallel-size {layout.context} needs Transformer Engine's "
            "attention, which a CPU lacks: rehearse it with --rehearse-on-gpus, or without that "
            "(--set megatron.context-parallel-size=1)"
        )
    made: dict[str, Any] = {f"megatron.{name}": None for name in spec.options if name.startswith(OF_GPUS)}
    if spec.options.get("moe-token-dispatcher-type") == "flex":
        made["megatron.moe-token-dispatcher-type"] = "alltoall"
    return made | rehearse.on_a_cpu(spec.trainer)
