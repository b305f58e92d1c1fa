"""Checkpoints: kill and resume, resharding, types, weight decay, and Megatron's own options."""

import re
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from polycom_ext.integrations.megatron import coefficients

from .conftest import Run, Trainer
from .test_layouts import MOE_MODEL

POLYNORM = ("--polycom-activation", "polynorm")


def saving(folder: Path, interval: int = 2) -> list[str]:
    return ["--save", str(folder), "--load", str(folder), "--save-interval", str(interval)]


def tensors(checkpoint: Path) -> dict[str, torch.dtype]:
    """Model tensors of a checkpoint and their types."""
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {
        key: about.properties.dtype
        for key, about in metadata.items()
        if hasattr(about, "properties") and not key.startswith("optimizer.")
    }


def learned(checkpoint: Path, activation: str = "polynorm") -> list[float]:
    """All coefficients in one list."""
    layers = coefficients.from_megatron(checkpoint, activation)["layers"]
    return [value for layer in layers for value in (*layer["weight"], *layer["bias"])]


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, []),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel".split()),
        (2, "--use-distributed-optimizer".split()),
        (2, [*MOE_MODEL, *"--expert-model-parallel-size 2 --use-distributed-optimizer".split()]),
    ],
    ids=["one process", "TP2+SP", "DP2, distributed optimizer", "MoE, EP2, distributed optimizer"],
)
def test_kill_and_resume_is_the_straight_run(
    train: Trainer, tmp_path: Path, processes: int, layout: list[str]
) -> None:
    options = [*POLYNORM, *layout]
    straight = train(*options, *saving(tmp_path / "straight", 4), processes=processes, iterations=8)
    killed = train(
        *options,
        *saving(tmp_path / "killed", 4),
        processes=processes,
        iterations=8,
        kill_when=r"iteration        6/",
    )
    assert -9 in killed.statuses
    assert (tmp_path / "killed" / "latest_checkpointed_iteration.txt").read_text() == "4"
    resumed = train(*options, *saving(tmp_path / "killed", 4), processes=processes, iterations=8)
    assert min(resumed.metrics) == 5
    for name in ("train/loss", "train/grad_norm"):
        expected = {step: value for step, value in straight.series(name).items() if step > 4}
        assert resumed.series(name) == expected
    assert learned(tmp_path / "killed" / "iter_0000008") == learned(tmp_path / "straight" / "iter_0000008")


def test_a_checkpoint_reshards_with_its_optimizer(train: Trainer, tmp_path: Path) -> None:
    """Saved on one process, continued on two in each way: the straight run's losses."""
    options = [
        *POLYNORM,
        "--use-distributed-optimizer",
        "--dist-ckpt-optim-fully-reshardable",
        "--no-save-rng",
        "--no-load-rng",
        "--override-opt_param-scheduler",
    ]
    train(*options, *saving(tmp_path / "one", 3), iterations=3)
    load = ["--load", str(tmp_path / "one")]
    straight = train(*options, *load, iterations=6)
    assert min(straight.metrics) == 4
    for layout in ("--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", ""):
        resharded = train(*options, *load, *layout.split(), processes=2, iterations=6)
        for name in ("train/loss", "train/grad_norm"):
            assert resharded.series(name) == pytest.approx(straight.series(name), rel=2e-6), layout


def test_expert_coefficients_are_saved_once(train: Trainer, tmp_path: Path) -> None:
    train(
        *POLYNORM,
        *MOE_MODEL,
        "--expert-model-parallel-size",
        "2",
        *saving(tmp_path),
        processes=2,
        iterations=2,
    )
    saved = [key for key in tensors(tmp_path / "iter_0000002") if "activation_func" in key]
    assert sorted(saved) == [
        f"decoder.layers.mlp.experts.experts.activation_func.{name}" for name in ("bias", "weight")
    ]
    assert len(learned(tmp_path / "iter_0000002")) == 2 * 4


def test_coefficients_stay_float32_in_bf16(train: Trainer, tmp_path: Path) -> None:
    options = [*POLYNORM, "--bf16", "--use-distributed-optimizer"]
    run = train(*options, *saving(tmp_path, 3), processes=2, iterations=3)
    types = tensors(tmp_path / "iter_0000003")
    assert types["decoder.layers.mlp.linear_fc1.weight"] == torch.bfloat16
    assert {types[key] for key in types if "activation_func" in key} == {torch.float32}
    assert run.series("train/loss")[3] < run.series("train/loss")[1]
    moved = learned(tmp_path / "iter_0000003")
    assert any(value != torch.tensor(value).bfloat16().item() for value in moved)


def test_coefficients_learn_and_do_not_decay(train: Trainer, tmp_path: Path) -> None:
    """A decay that shrinks decayed weights by half in two steps leaves the coefficients to the gradient."""
    train(*POLYNORM, *saving(tmp_path, 2), "--weight-decay", "300", iterations=2)
    values = learned(tmp_path / "iter_0000002")
    initial = [1 / 3, 1 / 3, 1 / 3, 0.0] * 2
    assert values != pytest.approx(initial, abs=1e-5)
    assert values == pytest.approx(initial, abs=5e-3)


def test_use_checkpoint_args_restores_the_activation(train: Trainer, tmp_path: Path) -> None:
    train("--polycom-activation", "polynorm-2", *saving(tmp_path), iterations=2)
    run = train(*saving(tmp_path), "--use-checkpoint-args", "--override-opt_param-scheduler", iterations=4)
    assert re.search(r"Setting polycom_activation to polynorm-2", run.log)
    assert set(run.metrics) == {3, 4}


@pytest.mark.parametrize("options", [["--swiglu"], ["--swiglu", *MOE_MODEL]], ids=["dense", "MoE"])
def test_with_upstreams_own_activation_nothing_changes(
    train: Trainer, train_unpatched: Trainer, tmp_path: Path, options: list[str]
) -> None:
    """Bit-identical losses and gradient norms, and a checkpoint of the same keys and types."""
    runs: list[Run] = []
    for name, trainer in (("patched", train), ("unpatched", train_unpatched)):
        runs.append(trainer(*options, *saving(tmp_path / name, 5)))
    for metric in ("train/loss", "train/grad_norm"):
        assert runs[0].series(metric) == runs[1].series(metric)
    assert len(runs[0].metrics) == 5
    patched, unpatched = (
        FileSystemReader(tmp_path / name / "iter_0000005") for name in ("patched", "unpatched")
    )
    keys = [set(reader.read_metadata().state_dict_metadata) for reader in (patched, unpatched)]
    assert keys[0] == keys[1]
    assert tensors(tmp_path / "patched" / "iter_0000005") == tensors(tmp_path / "unpatched" / "iter_0000005")
