"""What `polycom plan` says of a rank's memory is what Megatron's ranks hold on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from polycom_ext.integrations.megatron import options, sizes
from polycom_ext.integrations.megatron.adapter import MegatronAdapter
from polycom_ext.planning.plan import by_part, plan
from polycom_ext.runs import rehearse
from polycom_ext.runs.layout import Layout
from polycom_ext.runs.spec import Spec, load

from .conftest import Trainer

TINY = Path(__file__).parents[3] / "configs" / "tiny"
SHORT = (
    *("mock-data=true", "train-data-path=null", "valid-data-path=null", "data-cache-path=null"),
    *("train-iters=2", "lr-warmup-iters=1", "log-interval=1", "eval-iters=0", "save-interval=2"),
)
PARTS = ("weights", "gradients", "optimizer", "activations")
CLOSE = 0.01
"""Of each part; 5 % of their sum was asked for."""


def spec(base: str, *changes: str, activation: str = "polynorm", processes: int = 2) -> Spec:
    options = [f"megatron.{change}" for change in (*SHORT, *changes)]
    alone = [f"processes_per_node={processes}", "name=measured", f"activation={activation}"]
    return load(TINY / f"base-{base}.yaml", [*alone, *options])


def held(train: Trainer, folder: Path, run: Spec) -> list[dict[str, Any]]:
    """Of each rank, in bytes."""
    arguments = MegatronAdapter().arguments(run, folder / "run")[2:]
    return train.ranks("allocated.py", folder, *arguments, processes=run.world_size)


def stages(run: Spec) -> list[dict[str, int]]:
    """What is planned of each pipeline stage, as if it were the only one."""
    layout: Layout = MegatronAdapter().layout(run)
    found = []
    for stage in layout.stages:
        sums = dict.fromkeys(PARTS, 0.0)
        for state in layout.states:
            for expert, replicas in ((False, layout.replicas), (True, layout.expert_replicas)):
                for stored, size in state.size.items():
                    shards = replicas if state.sharded else 1
                    sums[state.part] += stage.parameters(expert, stored) * size / shards
        for (count, _), one in stage.held:
            sums[one.part] += count * one.size.value
        found.append({part: int(size) for part, size in sums.items()})
    return found


def assert_close(measured: Sequence[dict[str, Any]], planned: dict[str, int], close: float = CLOSE) -> None:
    """Each part, of the mean of ranks that hold the same but for what routers give them."""
    for part in PARTS:
        mean = sum(rank[part] for rank in measured) / len(measured)
        assert planned[part] == pytest.approx(mean, rel=close), part
    everything = sum(rank[part] for rank in measured for part in PARTS) / len(measured)
    assert sum(planned.values()) == pytest.approx(everything, rel=0.05)


def test_a_rank_of_tensor_parallelism_holds_what_is_planned(train: Trainer, tmp_path: Path) -> None:
    """In bf16 and under sequence parallelism, where upstream's own report is right too."""
    run = spec("dense", "tensor-model-parallel-size=2", "sequence-parallel=true", "bf16=true")
    ranks = held(train, tmp_path, run)
    [planned] = stages(run)
    for rank in ranks:
        assert_close([rank], planned, 1e-4)
    one = plan(run)
    assert by_part(one.memory) == planned
    assert one.flops_per_token == pytest.approx(ranks[0]["upstream's FLOPs a token"], rel=1e-9)
    reported = ranks[0]["upstream's weights, gradients, optimizer"]
    assert sum(planned[part] for part in PARTS[:3]) == pytest.approx(reported, rel=2e-3)


def test_a_stage_of_a_pipeline_holds_what_is_planned(train: Trainer, tmp_path: Path) -> None:
    """Upstream's report has 18 bytes a parameter in float32 too, which takes 16."""
    run = spec("dense", "pipeline-model-parallel-size=2", "micro-batch-size=2")
    ranks = held(train, tmp_path, run)
    planned = stages(run)
    for rank, stage in zip(ranks, planned, strict=True):
        assert_close([rank], stage, 1e-4)
    first = sum(planned[0][part] for part in PARTS[:3])
    assert ranks[0]["upstream's weights, gradients, optimizer"] == pytest.approx(first * 18 / 16, rel=2e-3)
    assert by_part(plan(run).memory)["activations"] == planned[0]["activations"]


@pytest.mark.long
def test_a_rank_of_interleaved_stages_holds_what_is_planned(train: Trainer, tmp_path: Path) -> None:
    virtual = ("num-virtual-stages-per-pipeline-rank=2", "micro-batch-size=1")
    run = spec("dense", "pipeline-model-parallel-size=2", *virtual)
    for rank, stage in zip(held(train, tmp_path, run), stages(run), strict=True):
        assert_close([rank], stage)


LAYOUTS = {
    "dense, tensor parallel": (
        "dense-1b/table-1",
        ["tensor-model-parallel-size=2", "sequence-parallel=true"],
    ),
    "dense, pipeline": ("dense-1b/table-1", ["pipeline-model-parallel-size=2"]),
    "experts": ("moe-1b-7b/megatron", ["expert-model-parallel-size=2"]),
}


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rehearsal_of_the_papers_runs_holds_what_is_planned(
    layout: str, train: Trainer, tmp_path: Path
) -> None:
    """So small that what Megatron pads its buffers by shows."""
    config, changes = LAYOUTS[layout]
    options = [f"megatron.{change}" for change in (*SHORT, *changes)]
    alone = ["nodes=1", "processes_per_node=2", "activation=polynorm"]
    [run] = rehearse.load_each(TINY.parent / f"{config}.yaml", [*alone, *options])
    ranks = held(train, tmp_path, run)
    planned = stages(run)
    for index, of_stage in enumerate(planned):
        holding = ranks if len(planned) == 1 else [ranks[index]]
        everything = sum(rank[part] for rank in holding for part in PARTS) / len(holding)
        assert sum(of_stage.values()) == pytest.approx(everything, rel=0.05)


@pytest.mark.parametrize("activation", ["polynorm", pytest.param("swiglu", marks=pytest.mark.long)])
def test_a_rank_of_expert_parallelism_holds_what_is_planned(
    activation: str, train: Trainer, tmp_path: Path
) -> None:
    """Upstream's report puts all experts on every rank, whatever expert parallelism there is."""
    run = spec("moe", "bf16=true", "use-distributed-optimizer=true", activation=activation)
    ranks = held(train, tmp_path, run)
    [planned] = stages(run)
    assert_close(ranks, planned, 0.02)  # tokens are not spread evenly over the experts
    everything = sum(planned[part] for part in PARTS[:3])
    assert ranks[0]["upstream's weights, gradients, optimizer"] > 1.1 * everything


BLOCKS = {
    "one wide tensor": ["recompute-granularity=selective", "recompute-modules=[mlp_act]"],
    "attention recomputed": ["recompute-granularity=selective"],
    "grouped queries": ["group-query-attention=true", "num-query-groups=2", "qk-layernorm=true", "bf16=true"],
    "biases": ["disable-bias-linear=false", "normalization=LayerNorm"],
    "GPT-2's ends": ["position-embedding-type=learned_absolute", "untie-embeddings-and-output-weights=false"],
}


@pytest.mark.long
@pytest.mark.parametrize("changes", BLOCKS.values(), ids=BLOCKS)
def test_one_rank_holds_what_is_planned(changes: list[str], train: Trainer, tmp_path: Path) -> None:
    run = spec("dense", *changes, processes=1)
    [planned] = stages(run)
    assert_close(held(train, tmp_path, run), planned)


@pytest.mark.long
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu", "relu2", "polyrelu", "polyprelu", "xielu"])
def test_an_activation_keeps_what_is_planned(activation: str, train: Trainer, tmp_path: Path) -> None:
    run = spec("dense", "num-layers=1", "bf16=true", activation=activation, processes=1)
    [planned] = stages(run)
    assert_close(held(train, tmp_path, run), planned, 1e-3)


def test_upstreams_defaults_are_those_of_the_plan(tree: Path) -> None:
    known = options.known(tree)
    assert {name: known[name].default for name in sizes.DEFAULTS} == sizes.DEFAULTS
    assert {*sizes.BEYOND, *sizes.ONLY} <= {*known}
