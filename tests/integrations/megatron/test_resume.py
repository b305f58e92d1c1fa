"""A resumed run is the straight run, bit for bit, with any optimizer, types, format and activation."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest

from .conftest import Trainer
from .test_layouts import MOE_MODEL

OPTIMIZERS = {
    "optimizer": (1, ""),
    "DP2, distributed optimizer": (2, "--use-distributed-optimizer"),
    # Two coefficients' parameters, 64 numbers apart: the second and the fourth rank's share holds none.
    "DP4, distributed optimizer, one layer": (
        4,
        "--use-distributed-optimizer --num-layers 1 --global-batch-size 8",
    ),
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "MoE, EP2": (2, " ".join([*MOE_MODEL, "--expert-model-parallel-size 2"])),
    "MoE, EP2, distributed optimizer": (
        2,
        " ".join([*MOE_MODEL, "--expert-model-parallel-size 2 --use-distributed-optimizer"]),
    ),
}
TYPES = {"fp32": "", "bf16": "--bf16", "fp16": "--fp16 --initial-loss-scale 4096"}
FORMATS = ("torch_dist", "torch")
ACTIVATIONS = {
    "gelu": "",
    **{name: f"--polycom-activation {name}" for name in ("polynorm", "polyrelu-2", "polyprelu")},
}

# What a rank holds and how it is saved changes with the optimizer, the type and the format; loss scaling adds
# nothing where parameters are split otherwise, and the activation only the names and number of coefficients.
SPLIT = ["TP2", "MoE, EP2", "MoE, EP2, distributed optimizer"]
MATRIX = [
    ("DP4, distributed optimizer, one layer", "bf16", "torch_dist", "polynorm"),
    *product(("optimizer", "DP2, distributed optimizer"), TYPES, FORMATS, ["polynorm"]),
    *product(SPLIT, ("fp32", "bf16"), FORMATS, ["polynorm"]),
    *product(
        ("optimizer", "DP2, distributed optimizer"), ["bf16"], FORMATS, ("gelu", "polyrelu-2", "polyprelu")
    ),
]
QUICK = [
    ("optimizer", "bf16", "torch_dist", "polynorm"),  # float32 coefficients beside bf16 weights
    ("DP2, distributed optimizer", "bf16", "torch_dist", "polynorm"),
    ("DP2, distributed optimizer", "bf16", "torch", "polynorm"),
    ("DP4, distributed optimizer, one layer", "bf16", "torch_dist", "polynorm"),
    ("MoE, EP2", "bf16", "torch_dist", "polynorm"),  # two optimizers, chained
]


def marked(cell: tuple[str, ...]) -> object:
    """A cell of the matrix, in `make test` if it is a quick one."""
    return pytest.param(*cell, id=", ".join(cell), marks=() if cell in QUICK else pytest.mark.full)


@pytest.mark.parametrize(("optimizer", "dtype", "format_", "activation"), [marked(cell) for cell in MATRIX])
def test_resumed_is_straight(
    train: Trainer, tmp_path: Path, optimizer: str, dtype: str, format_: str, activation: str
) -> None:
    processes, layout = OPTIMIZERS[optimizer]
    options = f"{layout} {TYPES[dtype]} --ckpt-format {format_} {ACTIVATIONS[activation]}".split()
    assert_resumes(train, tmp_path, options, processes)


@pytest.mark.full
@pytest.mark.parametrize("optimizer", ["optimizer", "DP2, distributed optimizer"])
def test_resumed_from_what_was_written_beside_training(
    train: Trainer, tmp_path: Path, optimizer: str
) -> None:
    processes, layout = OPTIMIZERS[optimizer]
    options = [*layout.split(), *ACTIVATIONS["polynorm"].split()]
    beside = "--async-save --async-strategy mcore --use-persistent-ckpt-worker".split()
    assert_resumes(train, tmp_path, options, processes, beside)


def assert_resumes(
    train: Trainer, folder: Path, options: list[str], processes: int, saving: Sequence[str] = ()
) -> None:
    """From the second of five steps, on which alone a checkpoint is looked at."""
    save = ("--save", str(folder), "--save-interval", "2", *saving)
    straight = train(*options, *save, processes=processes)
    assert set(straight.metrics) == {1, 2, 3, 4, 5}
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = train(*options, "--load", str(folder), processes=processes)
    assert set(resumed.metrics) == {3, 4, 5}
    for name in ("train/loss", "train/grad_norm"):
        expected = {step: value for step, value in straight.series(name).items() if step > 2}
        assert resumed.series(name) == expected, name
