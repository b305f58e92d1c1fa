"""From one checkpoint, every parallel layout gives the same losses and gradient norms."""

from itertools import product
from pathlib import Path

import pytest

from polycom_ext.integrations.megatron.native import FLAGS

from .conftest import BIASES, Run, Trainer

FROM_CHECKPOINT = ("--finetune", "--no-load-optim", "--no-load-rng")

DENSE = {
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "TP2+SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "DP2, distributed optimizer": (2, "--use-distributed-optimizer"),
    "full recompute": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "selective recompute": (1, "--recompute-granularity selective --recompute-modules mlp"),
}

DENSE_MORE = {
    "TP4": (4, "--tensor-model-parallel-size 4"),
    "TP4+SP": (4, "--tensor-model-parallel-size 4 --sequence-parallel"),
    "TP2xPP2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "TP2+SP x DP2, distributed optimizer": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer",
    ),
    "PP2xDP2": (4, "--pipeline-model-parallel-size 2 --use-distributed-optimizer"),
    "TP2 with full recompute": (
        2,
        "--tensor-model-parallel-size 2 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
    ),
}

DENSE_OVERLAPPED = {
    "DP2, overlapped": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "DP4, two optimizer instances": (
        4,
        "--use-distributed-optimizer --num-distributed-optimizer-instances 2 --micro-batch-size 1",
    ),
    "DP4, two optimizer instances, overlapped": (
        4,
        "--use-distributed-optimizer --num-distributed-optimizer-instances 2 --micro-batch-size 1 "
        "--overlap-grad-reduce --overlap-param-gather",
    ),
}

PP2 = ("--pipeline-model-parallel-size", "2")

FOUR_LAYERS = "--num-layers 4 --eval-interval 4 --eval-iters 2".split()

INTERLEAVED = {
    "VPP": "--num-layers-per-virtual-pipeline-stage 1",
    "VPP, overlapped from end to end": (
        "--num-layers-per-virtual-pipeline-stage 1 --overlap-p2p-communication-warmup-flush"
    ),
}

MOE_MODEL = """
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24 --moe-token-dispatcher-type alltoall
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001
""".split()

MOE = {
    "EP2": (2, "--expert-model-parallel-size 2"),
    "ETP2": (2, "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2"),
    "TP2, ETP1, EP2": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 "
        "--expert-model-parallel-size 2",
    ),
}

MOE_MORE = {
    "EP2, distributed optimizer": (2, "--expert-model-parallel-size 2 --use-distributed-optimizer"),
    "EP2xPP2": (4, "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "TP2+SP, ETP1, EP4": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 "
        "--expert-model-parallel-size 4",
    ),
    "TP2+SP x DP2, ETP1, EP2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 "
        "--expert-model-parallel-size 2",
    ),
}

MOE_OTHERWISE = {
    "EP2, allgather dispatcher": (2, "--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather"),
    "TP2, ETP1, EP2, allgather dispatcher": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 "
        "--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather",
    ),
    "EP2, overlapped": (
        2,
        "--expert-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather",
    ),
}

# each expert's tokens as they come, and padded to the same number
SINGLE = [*MOE_MODEL, "--micro-batch-size", "1"]
CAPACITY = [*SINGLE, *"--moe-expert-capacity-factor 2 --moe-pad-expert-input-to-capacity".split()]

EXPERTS_IN_PARTS = {
    "EP2": MOE["EP2"],
    "TP2+SP x DP2, ETP2, EP2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2 "
        "--expert-model-parallel-size 2",
    ),
    "DP4, ETP2, EP2": (4, "--expert-tensor-parallel-size 2 --expert-model-parallel-size 2"),
}

TWO = ["polynorm", "polyrelu"]  # one with row sums to share, one without

SHARED_EXPERT_AND_MTP = [*MOE_MODEL, *"--moe-shared-expert-intermediate-size 24 --mtp-num-layers 1".split()]


MLP_ACT = "--recompute-granularity selective --recompute-modules mlp_act".split()

# some biases' gradients are zero but for rounding, and AdamW's eps is to keep it from stepping by their sign
BIASED = [BIASES, *"--adam-eps 1e-4".split()]


def assert_same(run: Run, reference: Run) -> None:
    """Six digits of loss and gradient norm, from the third iteration on."""
    for name in ("train/loss", "train/grad_norm"):
        expected = reference.series(name)
        assert set(expected) >= {3, 4, 5}
        for step in (3, 4, 5):
            assert run.series(name)[step] == pytest.approx(expected[step], rel=1e-6), (name, step)


class Start:
    """A checkpoint of each model, and the straight run from it on one process, or in another layout."""

    def __init__(self, train: Trainer, folder: Path) -> None:
        self._train, self._folder = train, folder
        self._made: dict[str, tuple[list[str], Run]] = {}

    def __call__(
        self, activation: str, model: list[str], layout: str = "", processes: int = 1
    ) -> tuple[list[str], Run]:
        """Options that start from the checkpoint, and the straight run."""
        key = f"{activation} {' '.join(model)}"
        if key not in self._made:
            flags = [f"--{flag}" for flag in FLAGS.get(activation, {})]
            options = [*model, *(flags or ["--polycom-activation", activation])]
            checkpoint = str(self._folder / str(len(self._made)))
            save = ("--save", checkpoint, "--save-interval", "2", "--no-save-optim", "--no-save-rng")
            self._train(*options, *layout.split(), *save, processes=processes, iterations=2)
            options += ["--load", checkpoint, *FROM_CHECKPOINT]
            self._made[key] = options, self._train(*options, *layout.split(), processes=processes)
        return self._made[key]


@pytest.fixture(scope="session")
def start(train: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Start:
    return Start(train, tmp_path_factory.mktemp("start"))


@pytest.mark.parametrize("activation", TWO)
@pytest.mark.parametrize("layout", DENSE)
def test_dense(train: Trainer, start: Start, activation: str, layout: str) -> None:
    options, straight = start(activation, [])
    processes, more = DENSE[layout]
    assert_same(train(*options, *more.split(), processes=processes), straight)


@pytest.mark.parametrize("activation", TWO)
@pytest.mark.parametrize("layout", MOE)
def test_moe(train: Trainer, start: Start, activation: str, layout: str) -> None:
    options, straight = start(activation, MOE_MODEL)
    processes, more = MOE[layout]
    assert_same(train(*options, *more.split(), processes=processes), straight)


@pytest.mark.parametrize("recompute", [[], MLP_ACT], ids=["kept", "recomputed"])
def test_dense_with_biases(train: Trainer, start: Start, recompute: list[str]) -> None:
    """FC1's bias, added with the activation, is sharded as the width is, and its gradient is whole."""
    options, straight = start("polynorm", BIASED)
    processes, more = DENSE["TP2+SP"]
    assert_same(train(*options, *more.split(), *recompute, processes=processes), straight)


@pytest.mark.parametrize("layout", ["ETP2", "TP2, ETP1, EP2"])
def test_shared_expert_and_mtp(train: Trainer, start: Start, layout: str) -> None:
    options, straight = start("polynorm", SHARED_EXPERT_AND_MTP)
    processes, more = MOE[layout]
    assert_same(train(*options, *more.split(), processes=processes), straight)


def test_virtual_pipeline_stages(train: Trainer, start: Start) -> None:
    """Sends that are under way while upstream frees what they read, or forgets them, as in an evaluation."""
    options, straight = start("polynorm", FOUR_LAYERS)
    run = train(*options, *INTERLEAVED["VPP, overlapped from end to end"].split(), *PP2, processes=2)
    assert_same(run, straight)
    assert run.series("valid/loss") == pytest.approx(straight.series("valid/loss"), rel=1e-6)


# TWO in DENSE and MOE are the quick tests' part. What is these ones' own (parameters, sums) meets every way
# to share work there; the layouts that combine those ways call the same operations as with TWO.
OTHERS = ["polyprelu", "polyrelunorm"]
OTHER_ORDERS = ["polynorm-1", "polynorm-4", "polyrelu-4"]  # what an order changes is the same in every layout


@pytest.mark.full
@pytest.mark.parametrize(
    ("layout", "activation"),
    [
        *product(DENSE, OTHERS),
        *product([*DENSE_MORE, *DENSE_OVERLAPPED], TWO),
        *product(("TP2+SP", "full recompute"), OTHER_ORDERS),
    ],
)
def test_dense_matrix(train: Trainer, start: Start, activation: str, layout: str) -> None:
    options, straight = start(activation, [])
    processes, more = {**DENSE, **DENSE_MORE, **DENSE_OVERLAPPED}[layout]
    assert_same(train(*options, *more.split(), processes=processes), straight)


@pytest.mark.full
@pytest.mark.parametrize(
    ("layout", "activation"),
    [
        *product(MOE, OTHERS),
        *product([*MOE_MORE, *MOE_OTHERWISE], TWO),
        *product(("EP2", "ETP2"), OTHER_ORDERS),
    ],
)
def test_moe_matrix(train: Trainer, start: Start, activation: str, layout: str) -> None:
    options, straight = start(activation, MOE_MODEL)
    processes, more = {**MOE, **MOE_MORE, **MOE_OTHERWISE}[layout]
    assert_same(train(*options, *more.split(), processes=processes), straight)


WITH_BIASES = ["polynorm", "polyrelu", "polyprelu"]  # the last one adds them by plain operations
DIVIDED = ["TP2", "TP2+SP", "full recompute"]  # what holds a layer whole is alike for all of them
RECOMPUTED = {
    "TP2, MLP's activation recomputed": (2, " ".join(["--tensor-model-parallel-size 2", *MLP_ACT])),
    "MLP's activation recomputed": (1, " ".join(MLP_ACT)),
}


@pytest.mark.full
@pytest.mark.parametrize(
    ("layout", "activation"),
    [
        *product(DIVIDED, WITH_BIASES),
        *product(["PP2", "DP2, distributed optimizer", *DENSE_MORE, *RECOMPUTED], WITH_BIASES[:1]),
    ],
)
def test_dense_matrix_with_biases(train: Trainer, start: Start, activation: str, layout: str) -> None:
    options, straight = start(activation, BIASED)
    processes, more = {**DENSE, **DENSE_MORE, **RECOMPUTED}[layout]
    assert_same(train(*options, *more.split(), processes=processes), straight)


@pytest.mark.full
@pytest.mark.parametrize("activation", WITH_BIASES)
@pytest.mark.parametrize("layout", ["EP2xPP2", "EP2, distributed optimizer", "EP2, recomputed"])
def test_moe_matrix_with_biases(train: Trainer, start: Start, activation: str, layout: str) -> None:
    """Upstream has them without tensor parallelism, and on one process fails to add FC2's."""
    processes, more = MOE["EP2"]
    options, straight = start(activation, [*BIASED, *MOE_MODEL], more, processes)
    if layout == "EP2, recomputed":
        more = " ".join([more, *MLP_ACT])
    else:
        processes, more = MOE_MORE[layout]
    assert_same(train(*options, *more.split(), processes=processes), straight)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["TP2, ETP1, EP2", "ETP2"])
def test_shared_expert_and_mtp_recomputed(train: Trainer, start: Start, layout: str) -> None:
    options, straight = start("polynorm", SHARED_EXPERT_AND_MTP)
    processes, more = MOE[layout]
    assert_same(train(*options, *more.split(), *MLP_ACT, processes=processes), straight)


@pytest.mark.full
@pytest.mark.parametrize("model", ["dense", "MoE"])
@pytest.mark.parametrize("layout", INTERLEAVED)
def test_virtual_pipeline_stages_matrix(train: Trainer, start: Start, model: str, layout: str) -> None:
    """The rehearsal's sends are the same for any activation, upstream's own among them."""
    options, straight = start("polynorm", [*FOUR_LAYERS, *(MOE_MODEL if model == "MoE" else [])])
    for _ in range(2):  # what is a race does not show each time
        assert_same(train(*options, *INTERLEAVED[layout].split(), *PP2, processes=2), straight)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["TP2", "TP2+SP", "DP2, distributed optimizer"])
def test_odd_width(train: Trainer, start: Start, layout: str) -> None:
    options, straight = start("polynorm", ["--ffn-hidden-size", "690"])
    processes, more = DENSE[layout]
    assert_same(train(*options, *more.split(), processes=processes), straight)


@pytest.mark.full
@pytest.mark.parametrize("activation", ["polynorm", "polyrelu"])
@pytest.mark.parametrize("model", [SINGLE, CAPACITY], ids=["as they come", "padded to capacity"])
@pytest.mark.parametrize("layout", EXPERTS_IN_PARTS)
def test_experts_in_parts(
    train: Trainer, start: Start, activation: str, model: list[str], layout: str
) -> None:
    options, straight = start(activation, model)
    processes, more = EXPERTS_IN_PARTS[layout]
    assert_same(train(*options, *more.split(), processes=processes), straight)


@pytest.mark.full
def test_mtp_in_a_pipeline(train: Trainer, start: Start) -> None:
    options, straight = start("polynorm", SHARED_EXPERT_AND_MTP)
    assert_same(train(*options, *PP2, processes=2), straight)
