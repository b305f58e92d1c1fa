"""Megatron's layers on Transformer Engine's are the local ones, in every layout, and so are its op fuser's.

TE's real Python over a stand-in for its compiled module; attention is its unfused one, in plain torch.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from polycom_ext import cli

from ..transformer_engine.test_transformer_engine import WHEELS, unpack
from .conftest import Trainer
from .test_layouts import (
    BIASED,
    DENSE,
    DENSE_MORE,
    MLP_ACT,
    MOE,
    MOE_MODEL,
    SHARED_EXPERT_AND_MTP,
    Start,
    assert_same,
)
from .test_layouts import start as start

pytestmark = pytest.mark.full

# Of extra state, which TE's layers have and the local ones' checkpoints lack, nothing is said.
ON_TE = """
    --transformer-impl transformer_engine --attention-backend unfused --dist-ckpt-strictness log_all
""".split()
FUSER = [*ON_TE, *"--spec tests.integrations.megatron.fused_layers spec".split()]
GROUPED = [*ON_TE, "--moe-grouped-gemm"]
MOE_ACT = "--recompute-granularity selective --recompute-modules moe_act".split()

ONE = {"one process": (1, "")}
WHOLE_EXPERTS = {
    "EP2": MOE["EP2"],
    "TP2, ETP1, EP2": MOE["TP2, ETP1, EP2"],
    "TP4, ETP1, EP4": (
        4,
        "--tensor-model-parallel-size 4 --sequence-parallel --expert-tensor-parallel-size 1 "
        "--expert-model-parallel-size 4",
    ),
    "TP2xPP2, ETP1, EP2": (4, f"{MOE['TP2, ETP1, EP2'][1]} --pipeline-model-parallel-size 2"),
}
"""Upstream refuses biases of experts that are divided."""


LENIENT = "--dist-ckpt-strictness assume_ok_unexpected".split()
DENSE_MODEL = ["--polycom-activation", "polynorm"]
EXPERTS_MODEL = [*MOE_MODEL, *DENSE_MODEL]


@pytest.fixture(scope="module")
def on_te(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """Train with Transformer Engine at hand."""
    folder = tmp_path_factory.mktemp("on_te")
    sources = unpack(list(WHEELS)[-1], folder / "sources")
    trainer = Trainer(tree, folder, {"POLYCOM_TE_SOURCES": str(sources)})
    yield trainer
    trainer.close()


@pytest.mark.parametrize(
    "layout",
    [
        "one process",
        *(pytest.param(one, marks=pytest.mark.long) for one in ("TP2", "TP2+SP", "TP4", "TP2xPP2")),
    ],
)
@pytest.mark.parametrize("layers", [ON_TE, FUSER], ids=["layers", "op fuser"])
def test_dense(on_te: Trainer, start: Start, layers: list[str], layout: str) -> None:
    """From a checkpoint of the local layers; row sums are exact over the group, biases sharded."""
    options, straight = start("polynorm", BIASED)
    processes, more = {**ONE, **DENSE, **DENSE_MORE}[layout]
    assert_same(on_te(*options, *layers, *more.split(), processes=processes), straight)


@pytest.mark.long
@pytest.mark.parametrize("layers", [ON_TE, FUSER], ids=["layers", "op fuser"])
def test_dense_without_biases_and_recomputed(on_te: Trainer, start: Start, layers: list[str]) -> None:
    options, straight = start("polyrelu", [])
    processes, more = DENSE["TP2+SP"]
    assert_same(on_te(*options, *layers, *more.split(), *MLP_ACT, processes=processes), straight)


WIDE = """
    --hidden-size 128 --ffn-hidden-size 256 --seq-length 64 --max-position-embeddings 64 --bf16
    --global-batch-size 2 --polycom-activation polynorm
""".split()
"""Tensors that divide into blocks; of several micro-batches TE's layers keep the first one's FP8 weights."""
TP2 = DENSE["TP2"][1].split()


@pytest.fixture(scope="module")
def in_bfloat16(on_te: Trainer) -> dict[int, float]:
    """Losses by step."""
    return on_te(*WIDE, *ON_TE).series("train/loss")


@pytest.mark.parametrize(
    "layout", [[], pytest.param(TP2, marks=pytest.mark.long)], ids=["one process", "TP2"]
)
@pytest.mark.parametrize("recipe", ["delayed", "blockwise", "mxfp8"])
def test_in_fp8_the_op_fuser_is_the_layers(
    on_te: Trainer, in_bfloat16: dict[int, float], recipe: str, layout: list[str]
) -> None:
    """And is FP8, which is near to bfloat16, not the same."""
    options = [*WIDE, *layout, "--fp8-format", "e4m3", "--fp8-recipe", recipe]
    processes = 2 if layout else 1
    layers, fuser = (on_te(*options, *kind, processes=processes) for kind in (ON_TE, FUSER))
    losses = layers.series("train/loss")
    assert_same(fuser, layers)
    assert losses != in_bfloat16
    assert losses[1] == pytest.approx(in_bfloat16[1], rel=0.01)


@pytest.mark.long
@pytest.mark.parametrize("layers", [ON_TE, FUSER], ids=["layers", "op fuser"])
@pytest.mark.parametrize("recipe", ["delayed", "blockwise", "mxfp8"])
def test_in_fp8_sequence_parallel_ranks_are_tensor_parallel_ones(
    on_te: Trainer, recipe: str, layers: list[str]
) -> None:
    """What they gather, quantised, is what each of these quantises."""
    options = [*WIDE, *layers, "--fp8-format", "e4m3", "--fp8-recipe", recipe]
    parallel = on_te(*options, *DENSE["TP2+SP"][1].split(), processes=2)
    assert_same(parallel, on_te(*options, *TP2, processes=2))


@pytest.fixture(scope="module")
def experts(on_te: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Experts of TE's layers, one after the other, from a checkpoint of their own.

    The local layers' has the norm before them under another key.
    """
    return Start(on_te, tmp_path_factory.mktemp("experts"))


@pytest.mark.long
def test_experts_one_after_the_other_are_the_local_ones(on_te: Trainer, train: Trainer) -> None:
    options = [*SHARED_EXPERT_AND_MTP, "--polycom-activation", "polynorm"]
    assert_same(on_te(*options, *ON_TE), train(*options))


@pytest.mark.long
def test_experts_of_local_layers_go_on_once_they_are_converted(
    on_te: Trainer, train: Trainer, tmp_path: Path
) -> None:
    options = [*MOE_MODEL, "--polycom-activation", "polynorm"]
    train(*options, "--save", str(tmp_path / "local"), "--save-interval", "2", iterations=2)
    assert cli.main(["convert", str(tmp_path / "local"), str(tmp_path / "onward"), "--to", "megatron"]) == 0
    load = [*options, "--load", str(tmp_path / "onward")]
    default = ["--dist-ckpt-strictness", "assume_ok_unexpected"]
    straight = train(*load, *default)
    for layers in (ON_TE, GROUPED):
        assert_same(on_te(*load, *layers, *default), straight)


@pytest.mark.parametrize(
    "layout", ["one process", *(pytest.param(one, marks=pytest.mark.long) for one in MOE)]
)
def test_grouped_experts(on_te: Trainer, experts: Start, layout: str) -> None:
    """With a shared one beside them, and MTP."""
    options, straight = experts("polynorm", [*SHARED_EXPERT_AND_MTP, *ON_TE])
    processes, more = {**ONE, **MOE}[layout]
    recomputed = MOE_ACT if layout == "ETP2" else []
    assert_same(on_te(*options, *GROUPED, *more.split(), *recomputed, processes=processes), straight)


WIDE_EXPERTS = [*WIDE, *MOE_MODEL, "--moe-ffn-hidden-size", "128"]


@pytest.mark.long
@pytest.mark.parametrize("layout", ["one process", "ETP2"])
@pytest.mark.parametrize("recipe", ["delayed", "blockwise", "mxfp8"])
def test_in_fp8_grouped_experts_are_those_one_after_the_other(
    on_te: Trainer, experts: Start, recipe: str, layout: str
) -> None:
    """Of as many rows as come, padded to what the recipe quantises, and the router's weights with them."""
    options, in_bfloat16 = experts("polynorm", [*WIDE_EXPERTS, *ON_TE])
    processes, more = {**ONE, **MOE}[layout]
    options = [*options, *more.split(), "--fp8-format", "e4m3", "--fp8-recipe", recipe]
    grouped = on_te(*options, *GROUPED, processes=processes)
    assert_same(grouped, on_te(*options, processes=processes))
    found, near = (run.series("train/loss") for run in (grouped, in_bfloat16))
    assert found != near
    assert found[1] == pytest.approx(near[1], rel=0.01)


@pytest.mark.long
@pytest.mark.parametrize("layout", WHOLE_EXPERTS)
def test_grouped_experts_with_biases(on_te: Trainer, experts: Start, layout: str) -> None:
    options, straight = experts("polynorm", [*BIASED, *MOE_MODEL, *GROUPED])
    processes, more = WHOLE_EXPERTS[layout]
    assert_same(on_te(*options, *more.split(), processes=processes), straight)


IN_NORM = "--moe-grouped-experts-in-norm"


def test_upstream_s_experts_count_in_the_norm_where_asked(on_te: Trainer) -> None:
    """GELU's, which nobody marks else: that PolyCom names, which are marked, are the same function."""
    processes, more = MOE["ETP2"]
    options = [*MOE_MODEL, *GROUPED, *more.split()]

    def norm(*asked: str) -> float:
        return on_te(*options, *asked, processes=processes, iterations=1).series("train/grad_norm")[1]

    refused = on_te(*options, processes=processes, iterations=1)
    assert 2 in refused.statuses
    assert "leaves out the experts of every rank but the first" in refused.log
    assert IN_NORM in refused.log
    whole = norm(IN_NORM)
    assert whole == norm("--polycom-activation", "gelu")
    assert norm("--clip-grad", "0") < 0.999 * whole  # written down only


@pytest.mark.long
def test_swiglu_s_grouped_experts_count_in_the_norm_where_asked(on_te: Trainer, experts: Start) -> None:
    """As the baselines are to be run."""
    processes, more = MOE["ETP2"]
    options, straight = experts("swiglu", [*MOE_MODEL, *GROUPED])
    assert_same(on_te(*options, *more.split(), IN_NORM, processes=processes), straight)


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "layers"),
    [(DENSE_MODEL, ON_TE), (EXPERTS_MODEL, ON_TE), (EXPERTS_MODEL, GROUPED)],
    ids=["dense", "experts", "grouped experts"],
)
def test_what_is_written_for_ranks_is_for_these_layers_too(
    on_te: Trainer, train: Trainer, options: list[str], layers: list[str], tmp_path: Path
) -> None:
    saving = ["--save", str(tmp_path / "trained"), "--save-interval", "2"]
    train(*options, *saving, iterations=2)
    source, target = str(tmp_path / "trained"), str(tmp_path / "onward")
    assert cli.main(["convert", source, target, "--to", "megatron-torch"]) == 0
    straight = train(*options, "--load", source, "--finetune", *LENIENT, iterations=3)
    onward = on_te(*options, *layers, "--load", target, "--ckpt-format", "torch", iterations=3)
    assert onward.series("train/loss") == pytest.approx(straight.series("train/loss"), rel=1e-5)
