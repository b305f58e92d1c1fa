"""Activations that are no polynomials in Megatron: trained, exact where rows are sharded, and recorded."""

from pathlib import Path

import pytest

from polycom_ext.activations import REGISTRY, build
from polycom_ext.integrations.megatron.coefficients import from_megatron
from polycom_ext.modules import coefficients

from .conftest import Trainer
from .test_layouts import MOE, MOE_MODEL, Start, assert_same
from .test_layouts import start as start

FULL = pytest.mark.full
SCALARS = [name for name, entry in REGISTRY.items() if entry.learnable and not entry.ordered]
PLAIN = ["mish", "hardswish"]
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel".split()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "xielu" else FULL) for name in SCALARS]
)
def test_learnable_scalars_are_exact_under_tensor_parallelism(
    train: Trainer, start: Start, name: str
) -> None:
    options, straight = start(name, [])
    assert_same(train(*options, *TP2, processes=2), straight)


@FULL
@pytest.mark.parametrize(
    ("name", "layout"),
    [("swish", "TP2, ETP1, EP2"), *((name, "ETP2") for name in SCALARS)],
)
def test_learnable_scalars_are_exact_in_experts(train: Trainer, start: Start, name: str, layout: str) -> None:
    options, straight = start(name, MOE_MODEL)
    processes, more = MOE[layout]
    assert_same(train(*options, *more.split(), processes=processes), straight)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "swish" else FULL) for name in [*SCALARS, *PLAIN]]
)
def test_trained_in_bf16_and_recorded(train: Trainer, tmp_path: Path, name: str) -> None:
    save = ("--save", str(tmp_path), "--save-interval", "20", "--lr", "1e-2")
    run = train("--polycom-activation", name, "--bf16", *TP2, *save, processes=2, iterations=20)
    losses = run.series("train/loss")
    assert losses[20] < losses[1] - 0.1
    read = from_megatron(tmp_path, name)
    at_start = build(name)
    assert [set(layer) - {"name"} for layer in read["layers"]] == (
        [{*dict(at_start.named_parameters())}] * 2 if coefficients(at_start) else []
    )
    for layer in read["layers"]:
        for parameter, value in at_start.named_parameters():
            (learned,) = layer[parameter]
            assert 1e-4 < abs(learned - value.item()) < 0.5
