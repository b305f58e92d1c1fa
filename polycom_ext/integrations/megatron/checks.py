"""What must hold of a Megatron run with any activation, checked before it starts."""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata
from typing import Any

from polycom_ext.errors import PolycomError
from polycom_ext.runs.adapter import Needs
from polycom_ext.runs.spec import Spec

UNEVEN_PIPELINE = (
    "decoder-first-pipeline-num-layers",
    "decoder-last-pipeline-num-layers",
    "pipeline-model-parallel-layout",
    "account-for-embedding-in-pipeline-split",
    "account-for-loss-in-pipeline-split",
)


def check(spec: Spec, resolved: dict[str, Any]) -> None:
    """Raise PolycomError for a length, a layout or a batch that cannot be, or that trains wrongly.

    Args:
        spec: the spec.
        resolved: its options, with the activation and the widths in upstream's terms.
    """
    _check_length(spec)
    _check_warmup(spec)
    _check_layout(spec, resolved)
    _check_losses(spec)
    _check_batch(spec)


def check_packages(spec: Spec) -> None:
    """Raise PolycomError for layers or an optimizer whose package is not installed here."""
    options = spec.options
    optimizer = str(options.get("optimizer", "adam"))
    needs = {"muon": (0, 1), "dist_muon": (0, 1), "lion": (0, 2)}.get(optimizer)
    name = f"optimizer {optimizer}"
    if needs and "muon" in optimizer and options.get("muon-scalar-optimizer") == "lion":
        needs, name = (0, 2), f"{name} with muon-scalar-optimizer lion"
    if needs and _version("emerging-optimizers") < needs:
        raise PolycomError(
            f"{spec.name}: megatron.{name} needs the package emerging-optimizers, "
            f"{'.'.join(map(str, needs))} or later, which is not installed"
        )
    precise = options.get("use-precision-aware-optimizer") and not options.get("optimizer-cpu-offload")
    if importlib.util.find_spec("transformer_engine") is None:
        if precise:
            raise PolycomError(
                f"{spec.name}: megatron.use-precision-aware-optimizer needs Transformer Engine's Adam, "
                "which is not installed"
            )
        if _on_transformer_engine(spec):
            raise PolycomError(
                f"{spec.name}: Megatron's layers are Transformer Engine's, which is not installed, unless "
                "megatron.transformer-impl is local"
            )


def needs(spec: Spec) -> Needs:
    """What a run imports of others' and whether it is one for GPUs only."""
    modules, on_gpu = {}, {}
    gpu = ""
    if _on_transformer_engine(spec):
        gpu = "Transformer Engine's layers run on GPUs only (megatron.transformer-impl is not local)"
        modules["transformer_engine.pytorch"] = "megatron.transformer-impl is not local"
    elif spec.options.get("use-precision-aware-optimizer"):
        on_gpu["transformer_engine.pytorch"] = "megatron.use-precision-aware-optimizer takes its Adam"
    if spec.options.get("distributed-backend", "nccl") == "nccl":
        gpu = gpu or "megatron.distributed-backend is nccl"
    if not spec.options.get("no-gradient-accumulation-fusion"):
        why = "megatron.no-gradient-accumulation-fusion is not set"
        modules |= {"apex": why, "fused_weight_gradient_mlp_cuda": f"it is of apex, and {why}"}
    return Needs(gpu, modules, on_gpu)


def _on_transformer_engine(spec: Spec) -> bool:
    return bool(spec.options.get("transformer-impl", "transformer_engine") != "local")


def integer(spec: Spec, name: str, default: int | None, least: int = 1) -> int | None:
    """An option that is a number; raises PolycomError where it is none, or too small."""
    value = spec.options.get(name, default)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise PolycomError(
            f"{spec.name}: megatron.{name} must be an integer of at least {least}, not {value!r}"
        )
    return None if value is None else int(value)


def _size(spec: Spec, name: str) -> int:
    size = integer(spec, name, 1)
    assert size is not None
    return size


def _check_length(spec: Spec) -> None:
    if "train-iters" not in spec.options and "train-samples" not in spec.options:
        raise PolycomError(f"{spec.name}: megatron.train-iters (or train-samples) must say how long to train")
    if "save-interval" not in spec.options:
        raise PolycomError(
            f"{spec.name}: megatron.save-interval must say how often to save, so that a run can resume"
        )


def _check_layout(spec: Spec, resolved: dict[str, Any]) -> None:
    """Processes, widths, layers, heads and experts must divide evenly over the ranks that share them."""
    tensor = _size(spec, "tensor-model-parallel-size")
    pipeline = _size(spec, "pipeline-model-parallel-size")
    context = _size(spec, "context-parallel-size")
    expert = _size(spec, "expert-model-parallel-size")
    expert_tensor = integer(spec, "expert-tensor-parallel-size", tensor) or tensor
    experts = integer(spec, "num-experts", None)

    def divides(divisor: int, divisor_name: str, number: Any, number_name: str) -> None:
        if isinstance(number, int) and number % divisor:
            raise PolycomError(
                f"{spec.name}: {divisor_name} {divisor} does not divide {number_name} {number}"
            )

    divides(
        tensor * pipeline * context, "tensor x pipeline x context parallel size", spec.world_size, "processes"
    )
    divides(tensor, "tensor-model-parallel-size", resolved.get("ffn-hidden-size"), "the FFN width")
    divides(tensor, "tensor-model-parallel-size", resolved.get("num-attention-heads"), "num-attention-heads")
    if not any(resolved.get(name) for name in UNEVEN_PIPELINE):
        divides(pipeline, "pipeline-model-parallel-size", resolved.get("num-layers"), "num-layers")
    if experts is None:
        if expert > 1:
            raise PolycomError(f"{spec.name}: expert-model-parallel-size {expert} needs megatron.num-experts")
        return
    divides(
        expert_tensor * expert * pipeline,
        "expert-tensor x expert x pipeline parallel size",
        spec.world_size,
        "processes",
    )
    if expert == 1 and expert_tensor != tensor:
        raise PolycomError(
            f"{spec.name}: expert-tensor-parallel-size {expert_tensor} other than tensor-model-parallel-size "
            f"{tensor} trains wrongly in Megatron unless expert-model-parallel-size is above 1: set that, or "
            "make the two equal"
        )
    divides(expert, "expert-model-parallel-size", experts, "num-experts")
    divides(
        expert_tensor,
        "expert-tensor-parallel-size",
        resolved.get("moe-ffn-hidden-size"),
        "the experts' width",
    )


def _check_batch(spec: Spec) -> None:
    micro, batch = integer(spec, "micro-batch-size", None), integer(spec, "global-batch-size", None)
    if micro is None or batch is None:
        return
    model = 1
    for dimension in ("tensor", "pipeline"):
        model *= _size(spec, f"{dimension}-model-parallel-size")
    replicas = spec.world_size // (model * _size(spec, "context-parallel-size"))
    if batch % (micro * replicas):
        raise PolycomError(
            f"{spec.name}: global-batch-size {batch} is not a multiple of micro-batch-size {micro} times "
            f"{replicas} data-parallel ranks"
        )


def _check_warmup(spec: Spec) -> None:
    """Upstream asserts it, without naming the options, once the model is built."""
    for unit in ("iters", "samples"):
        warmup = integer(spec, f"lr-warmup-{unit}", None, least=0)
        decay = next((n for n in (f"lr-decay-{unit}", f"train-{unit}") if n in spec.options), None)
        steps = None if decay is None else integer(spec, decay, None)
        if warmup is not None and steps is not None and warmup >= steps:
            raise PolycomError(
                f"{spec.name}: megatron.lr-warmup-{unit} {warmup} must be less than {decay} {steps}"
            )
    fraction = spec.options.get("lr-warmup-fraction", 0)
    if isinstance(fraction, int | float) and fraction >= 1:
        raise PolycomError(f"{spec.name}: megatron.lr-warmup-fraction {fraction} must be less than 1")


def _check_losses(spec: Spec) -> None:
    """Upstream weighs the router's losses by the tokens of one rank, and divides by those of all."""
    tensor = _size(spec, "tensor-model-parallel-size")
    if not (spec.options.get("calculate-per-token-loss") and spec.options.get("num-experts") and tensor > 1):
        return
    for name in ("moe-aux-loss-coeff", "moe-z-loss-coeff"):
        value = spec.options.get(name)
        if any(weight != 0 for weight in (value if isinstance(value, list) else [value or 0])):
            raise PolycomError(
                f"{spec.name}: megatron.calculate-per-token-loss weighs {name} by 1 / "
                f"tensor-model-parallel-size {tensor} (upstream), so layouts differ: remove one of the three"
            )


def _version(package: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, re.findall(r"\d+", metadata.version(package))[:2]))
    except metadata.PackageNotFoundError:
        return (0, 0)
