"""What a rehearsal of each run keeps and what it shrinks, without training it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from polycom_ext.errors import PolycomError
from polycom_ext.runs import rehearse
from polycom_ext.runs.adapter import find
from polycom_ext.runs.shrinking import INTERVAL, STEPS
from polycom_ext.runs.spec import Spec, load_each

from .test_paper import CONFIGS, PAPER

NAMES = [
    *PAPER,
    *(f"tiny/{path.stem}" for path in sorted((CONFIGS / "tiny").glob("*.yaml")) if "base" not in path.stem),
]
MEGATRON = [name for name in PAPER if "olmo" not in name]
LAYOUT = ("tensor", "pipeline", "context", "expert-model", "expert-tensor")


def both(name: str, *changes: str) -> list[tuple[Spec, Spec]]:
    """Each run, and its rehearsal."""
    path = CONFIGS / f"{name}.yaml"
    return list(zip(load_each(path, changes), rehearse.load_each(path, changes), strict=True))


def ratio(part: int | None, whole: int | None) -> Fraction:
    """Of numbers that a spec gives."""
    assert part
    assert whole
    return Fraction(part, whole)


@pytest.mark.parametrize("name", NAMES)
def test_kinds_and_proportions_stay_and_sizes_shrink(name: str) -> None:
    for run, small in both(name):
        before, after = (find(spec.trainer).facts(spec) for spec in (run, small))
        assert (small.name, small.rehearsal_of) == (f"{run.name}-rehearsal", run.name)
        assert (small.activation, small.upstream) == (run.activation, run.upstream)
        assert None not in (before.hidden, before.layers, before.heads, before.batch, before.ffn_width)
        assert ratio(after.ffn_width, after.hidden) == ratio(before.ffn_width, before.hidden)
        assert 2 <= (after.layers or 0) <= (before.layers or 0)
        assert 4 <= (after.heads or 0) <= (before.heads or 0)
        assert (after.hidden or 0) <= (before.hidden or 0)
        if before.experts:
            assert ratio(after.active_experts, after.experts) == ratio(before.active_experts, before.experts)
            assert (after.active_experts or 0) >= 2
        assert (after.batch or 1) % small.world_size == 0
        assert small.nodes == 1
        assert small.world_size <= 8
        assert find(small.trainer).total_steps(small) == STEPS


@pytest.mark.parametrize("name", MEGATRON)
def test_megatrons_layout_schedule_and_intervals_stay_in_shape(name: str) -> None:
    for run, small in both(name):
        old, new = run.options, small.options
        for part in LAYOUT:
            key = f"{part}-parallel-size" if part.startswith("expert") else f"{part}-model-parallel-size"
            assert new.get(key) == old.get(key)
        for key in ("normalization", "qk-layernorm", "use-distributed-optimizer", "bf16", "lr", "seed"):
            assert new.get(key) == old.get(key)
        assert new["lr-warmup-iters"] == max(1, round(old["lr-warmup-iters"] / old["train-iters"] * STEPS))
        if "lr-decay-iters" in old:
            assert new["lr-decay-iters"] == pytest.approx(
                old["lr-decay-iters"] / old["train-iters"] * STEPS, abs=0.5
            )
        assert [new[f"{what}-interval"] for what in ("save", "eval", "log")] == [INTERVAL, INTERVAL, 1]
        accumulated, left = (
            spec.options["global-batch-size"] // spec.options["micro-batch-size"] // spec.world_size
            for spec in (run, small)
        )
        assert left == min(accumulated, 2)


def test_olmos_schedule_sharding_and_labels_stay_in_shape() -> None:
    for run, small in both("moe-1b-7b/olmo"):
        old, new = run.options, small.options
        tokens = new["global_train_batch_size"] * new["model"]["max_sequence_length"]
        assert new["max_duration"] == f"{STEPS * tokens}T"
        for key in ("t_warmup", "t_max"):
            wanted = old["scheduler"][key] / 2e11 * STEPS * tokens
            assert new["scheduler"][key] == pytest.approx(wanted, rel=1e-3)
        assert new["fsdp"] == old["fsdp"]
        assert [one["label"] for one in new["evaluators"]] == [one["label"] for one in old["evaluators"]]
        assert [*new["evaluators"][0]["data"]["datasets"]] == [*old["evaluators"][0]["data"]["datasets"]]
        assert (new["save_interval"], new["eval_interval"]) == (INTERVAL, INTERVAL)
        for key in ("block_type", "moe_mlp_impl", "attention_layer_norm", "layer_norm_type", "init_device"):
            assert new["model"][key] == old["model"][key]


@pytest.mark.parametrize(
    ("changes", "processes"),
    [
        ("tensor-model-parallel-size=8 sequence-parallel=true", 16),
        ("pipeline-model-parallel-size=4 num-layers-per-virtual-pipeline-stage=3 global-batch-size=256", 8),
        ("pipeline-model-parallel-size=2 num-virtual-stages-per-pipeline-rank=4 global-batch-size=64", 4),
        ("tensor-model-parallel-size=2 pipeline-model-parallel-size=2 global-batch-size=128", 8),
        ("num-query-groups=8 group-query-attention=true tensor-model-parallel-size=4", 8),
        ("recompute-granularity=full recompute-method=uniform recompute-num-layers=4", 2),
        ("train-iters=null train-samples=61035200 lr-warmup-iters=null lr-warmup-samples=151424", 2),
        ("lr-decay-style=WSD lr-wsd-decay-iters=95367 lr-wsd-decay-style=linear", 2),
        ("rampup-batch-size=[32,32,100000]", 2),
        ("fp8-format=hybrid attention-backend=fused", 2),
    ],
)
def test_a_layout_of_the_users_is_kept_and_can_be_trained(changes: str, processes: int) -> None:
    options = [f"megatron.{change}" for change in changes.split()]
    [(run, small)] = both("dense-1b/table-1", "activation=polynorm", *options)
    assert small.processes_per_node == processes
    for spec in (run, small):
        find(spec.trainer).validate(spec)
    for name in ("tensor-model-parallel-size", "pipeline-model-parallel-size", "sequence-parallel"):
        assert small.options.get(name) == run.options.get(name)


@pytest.mark.parametrize(
    ("changes", "processes", "experts"),
    [
        ("expert-model-parallel-size=2", 2, 16),
        ("expert-model-parallel-size=16", 16, 16),
        ("expert-model-parallel-size=4 tensor-model-parallel-size=2 expert-tensor-parallel-size=2", 8, 16),
        ("expert-model-parallel-size=2 pipeline-model-parallel-size=2", 4, 16),
        ("moe-router-num-groups=8 moe-router-group-topk=4", 8, 64),
        ("moe-token-dispatcher-type=flex moe-enable-deepep=true moe-router-dtype=fp32", 8, 16),
    ],
)
def test_experts_of_the_users_are_kept_and_can_be_trained(changes: str, processes: int, experts: int) -> None:
    options = [f"megatron.{change}" for change in changes.split()]
    [(_, small)] = both("moe-1b-7b/megatron", "activation=polynorm", *options)
    assert (small.processes_per_node, small.options["num-experts"]) == (processes, experts)
    find(small.trainer).validate(small)


def test_on_gpus_kernels_and_back_end_stay() -> None:
    path = CONFIGS / "moe-1b-7b" / "megatron.yaml"
    run, cpu, gpu = (
        specs[0]
        for specs in (load_each(path), rehearse.load_each(path), rehearse.load_each(path, on_gpus=True))
    )
    of_gpus = (
        "transformer-impl",
        "attention-backend",
        "moe-grouped-gemm",
        "distributed-backend",
        "async-save",
    )
    assert [gpu.options.get(name) for name in of_gpus] == [run.options.get(name) for name in of_gpus]
    assert [cpu.options.get(name) for name in of_gpus] == ["local", None, None, "gloo", None]
    assert find("megatron").needs(cpu).gpu == ""
    assert find("megatron").needs(gpu).gpu


def test_parallel_contexts_are_for_gpus() -> None:
    change = "megatron.context-parallel-size=2"
    with pytest.raises(PolycomError, match="needs Transformer Engine's attention, which a CPU lacks"):
        both("dense-1b/table-1", change)
    path = Path(CONFIGS / "dense-1b" / "table-1.yaml")
    assert rehearse.load_each(path, [change], on_gpus=True)[0].processes_per_node == 4
