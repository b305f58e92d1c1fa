"""Training through OLMo's own Trainer on a CPU: strategies, precision, save, kill, resume, evaluation."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polycom_ext.activations import build
from polycom_ext.runs import record
from polycom_ext.runs.efficiency import CPU, model_flops, read
from polycom_ext.runs.record import Record

from .conftest import Trainer

FSDP2: dict[str, Any] = {"processes": 2, "save_interval": 3}
UNSHARDED: dict[str, Any] = {
    "save_interval": None,
    "save_interval_unsharded": 3,
    "save_num_checkpoints_to_keep": 0,
}
DDP2 = {"processes": 2, "distributed_strategy": "ddp", "ddp": {"grad_sync_mode": "batch"}} | UNSHARDED
BF16 = {"precision": "amp_bf16"}
POLYNORM: dict[str, Any] = {"activation_type": "polynorm"}
FULL = pytest.mark.full

RUNS: dict[str, dict[str, Any]] = {
    "dense, FSDP": FSDP2,
    "MoE, FSDP": FSDP2 | {"moe": True},
}
FULL_RUNS = {
    "dense, one process": {"save_interval": 3},
    "dense, DDP": DDP2,
    "dense, FSDP, unsharded": FSDP2 | UNSHARDED,
    "dense, FSDP, bf16": FSDP2 | BF16,
    "dense, FSDP, micro-batches": FSDP2 | {"device_train_microbatch_size": 1},
    "MoE, one process": {"moe": True, "save_interval": 3},
    "MoE, DDP": DDP2 | {"moe": True},
    "MoE, FSDP, bf16": FSDP2 | BF16 | {"moe": True},
    "MoE, FSDP, unsharded, bf16": FSDP2 | UNSHARDED | BF16 | {"moe": True},
}
CASES = [pytest.param(run, id=name) for name, run in RUNS.items()]
CASES += [pytest.param(run, id=name, marks=FULL) for name, run in FULL_RUNS.items()]


@pytest.mark.parametrize("settings", CASES)
def test_kill_and_resume_is_the_straight_run(train: Trainer, settings: dict[str, Any]) -> None:
    straight = train(model=POLYNORM, **settings)
    losses = straight.series("train/loss")
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[1] - 0.3

    killed = train(model=POLYNORM, kill_at=5, **settings)
    assert set(killed.statuses) == {-9}
    assert not (killed.folder / "coefficients.json").exists()
    before = killed.series("train/loss")
    assert list(before) == [1, 2, 3, 4, 5]
    resumed = train(model=POLYNORM, folder=killed.folder, **settings)
    assert "Loading" in resumed.log
    assert "step3" in resumed.log
    lines = (killed.folder / "metrics.jsonl").read_text().count('"train/loss"')
    assert lines == len(before) + 3, "the steps before the checkpoint were trained again"
    assert resumed.series("train/loss") == losses
    assert resumed.series("train/grad_norm") == straight.series("train/grad_norm")
    assert resumed.coefficients == straight.coefficients


@pytest.mark.full
def test_a_run_records_its_speed_its_memory_and_the_work_of_a_token(train: Trainer) -> None:
    """Of its four experts a token has two, so half of their weights, and no router, count."""
    run = train(moe=True, processes=2, model=POLYNORM)
    speeds, memory = run.series(record.TOKENS_PER_SECOND), run.series(record.PEAK_MEMORY)
    assert list(speeds) == [2, 3, 4, 5, 6]  # OLMo times no first step
    for step, seconds in list(run.series(record.STEP_SECONDS).items())[1:]:
        assert 0 < speeds[step] < 2.1 * 4 * 32 / seconds
    assert list(memory) == [1, 2, 3, 4, 5, 6]
    assert 2**26 < memory[6] < 2**34
    reckoned = read(Record(run.folder))
    assert reckoned is not None
    assert (reckoned.device, reckoned.devices, reckoned.peak_flops) == (CPU, 2, None)
    weights = 2 * (4 * 32 * 32 + 2 * 2 * 32 * 64) + 32 * 257
    assert reckoned.flops_per_token == model_flops(weights, layers=2, attention_width=32, sequence=32)


@pytest.mark.full
def test_weights_and_biases_keeps_what_olmo_logs_where_nothing_is_sent(train: Trainer) -> None:
    run = train(model=POLYNORM, wandb={"project": "polycom", "log_interval": 1})
    [kept] = (run.folder / "checkpoints" / "wandb").rglob("offline-run-*/run-*.wandb")
    logged = kept.read_bytes()
    assert b"train/CrossEntropyLoss" in logged
    assert b"throughput/device/tokens_per_second" in logged


@pytest.mark.parametrize("wrapping", ["by_block", None])
def test_coefficients_are_trained_complete_and_saved(train: Trainer, wrapping: str | None) -> None:
    settings: dict[str, Any] = {
        "model": POLYNORM | {"init_device": "meta"},
        "fsdp": {"wrapping_strategy": wrapping},
    }
    run = train(moe=True, processes=2, **settings, **UNSHARDED)
    saved = torch.load(run.folder / "checkpoints" / "step6-unsharded" / "model.pt")
    assert run.coefficients["step"] == 6
    assert run.coefficients["activation"] == "polynorm"
    layers = run.coefficients["layers"]
    assert [layer["name"] for layer in layers] == ["transformer.blocks.0.act", "transformer.blocks.1.act"]
    for layer in layers:
        assert len(layer["weight"]) == 3
        assert len(layer["bias"]) == 1
        assert layer["weight"] == saved[f"{layer['name']}.weight"].tolist()
        assert layer["bias"] == saved[f"{layer['name']}.bias"].tolist()
        assert 1e-3 < max(abs(value - 1 / 3) for value in layer["weight"]) < 0.1
    assert 1.3e-2 > run.metrics[6]["train/load_balancing_loss"] > 0.99e-2
    assert run.metrics[6]["train/router_z_loss"] > 0


@pytest.mark.full
@pytest.mark.parametrize(
    "activation",
    [
        *("gelu", "relu2", "mish", "hardswish", "prelu", "swish", "xielu"),
        *("polyrelu", "polyprelu", "polyrelunorm", "polynorm-4"),
    ],
)
@pytest.mark.parametrize("moe", [False, True])
def test_every_activation_trains(train: Trainer, activation: str, moe: bool) -> None:
    losses = train(moe=moe, model={"activation_type": activation}).series("train/loss")
    assert losses[6] < losses[1] - 0.3


@pytest.mark.parametrize(
    ("activation", "moe"),
    [("xielu", True), *(pytest.param(name, False, marks=FULL) for name in ("swish", "prelu"))],
)
def test_learnable_scalars_are_trained_complete_and_saved(train: Trainer, activation: str, moe: bool) -> None:
    settings: dict[str, Any] = {
        "model": {"activation_type": activation, "init_device": "meta"},
        "processes": 2,
    }
    run = train(moe=moe, **settings, **UNSHARDED)
    saved = torch.load(run.folder / "checkpoints" / "step6-unsharded" / "model.pt")
    start = {name: value.tolist() for name, value in build(activation).state_dict().items()}
    assert len(run.coefficients["layers"]) == 2
    for layer in run.coefficients["layers"]:
        assert set(layer) == {"name", *start}
        for name, (value,) in start.items():
            assert layer[name] == saved[f"{layer['name']}.{name}"].tolist()
            assert 1e-3 < abs(layer[name][0] - value) < 0.1


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_a_compiled_mixture_of_experts_trains_as_it_does_otherwise(train: Trainer, precision: str) -> None:
    settings: dict[str, Any] = {
        "moe": True,
        "processes": 2,
        "model": POLYNORM,
        "precision": precision,
        "max_duration": 3,
    }
    losses = train(**settings).series("train/loss")
    compiled = train(compile={}, **settings).series("train/loss")
    assert compiled == pytest.approx(losses, rel=1e-5 if precision == "fp32" else 1e-2)


def _unpatched(tree: Path, folder: Path) -> Path:
    """Upstream as it was, beside the patched tree's evaluation data."""
    base = subprocess.check_output(
        ["git", "rev-list", "--max-parents=0", "HEAD"], cwd=tree, text=True
    ).strip()
    archive = subprocess.check_output(["git", "archive", base, "olmo"], cwd=tree)
    subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
    (folder / "olmo_data").symlink_to(tree / "olmo_data")
    return folder


def test_swiglu_is_bit_identical_to_unpatched_olmo(
    train: Trainer, tree: Path, train_on: Callable[[list[Path]], Trainer], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"processes": 2, "model": {"activation_type": "swiglu"}} | UNSHARDED
    patched = train(**settings)
    unpatched = train_on([_unpatched(tree, tmp_path)])(**settings)
    for name in ("train/loss", "train/grad_norm"):
        assert patched.series(name) == unpatched.series(name)
        assert len(patched.series(name)) == 6
    states = [
        torch.load(run.folder / "checkpoints" / "step6-unsharded" / "model.pt")
        for run in (patched, unpatched)
    ]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_evaluation_uses_the_wheels_questions_and_table_2s_labels(train: Trainer, valid_path: str) -> None:
    label = "c4_en-validation"
    tasks = ["copa", "sciq", "piqa"]
    run = train(
        processes=2,
        max_duration=2,
        evaluators=[
            {
                "label": "all-small-ppl-validation",
                "data": {"datasets": {label: [valid_path]}, "drop_last": True},
            },
            *({"label": task, "type": "downstream", "subset_num_batches": 2} for task in tasks),
        ],
        device_eval_batch_size=4,
        model=POLYNORM | {"max_sequence_length": 512},
    )
    final = run.metrics[2]
    assert 0 < final[f"valid/{label}/loss"] < 6
    for task in tasks:
        assert 0 <= final[f"eval/{task}/acc"] <= 1


@pytest.mark.full
def test_all_offline_tasks_of_the_paper_are_there(train: Trainer) -> None:
    groups = [f"mmlu_{group}_var" for group in ("stem", "humanities", "social_sciences", "other")]
    tasks = [
        *("hellaswag", "arc_easy", "arc_challenge", "winogrande", "openbook_qa", "boolq"),
        *("commonsense_qa", "social_iqa", *groups),
    ]
    run = train(
        max_duration=1,
        evaluators=[{"label": task, "type": "downstream", "subset_num_batches": 1} for task in tasks],
        device_eval_batch_size=8,
        model=POLYNORM | {"max_sequence_length": 2048},
        global_train_batch_size=1,
        device_train_microbatch_size=1,
    )
    assert {f"eval/{task}/acc" for task in [*tasks, "mmlu"]} <= set(run.metrics[1])
    assert run.metrics[1]["eval/mmlu/acc"] == pytest.approx(
        sum(run.metrics[1][f"eval/{group}/acc"] for group in groups) / 4
    )


REFUSALS: dict[str, dict[str, Any]] = {
    "unknown activation 'polynrm'": {"model": {"activation_type": "polynrm"}},
    "must be at least 1": {"model": {"activation_type": "polynorm-0"}},
    "not a multiple of 2 processes": {"processes": 2, "global_train_batch_size": 5},
    "not a multiple of device_train_microbatch_size": {"device_train_microbatch_size": 3},
    "distributed_strategy must be fsdp or ddp": {"distributed_strategy": None},
    "save_interval_unsharded": {"distributed_strategy": "ddp", "ddp": {"grad_sync_mode": "batch"}},
    "moe_top_k 5 is not in 1..4": {"moe": True, "model": {"moe_top_k": 5}},
    "needs megablocks": {"moe": True, "model": {"moe_dropless": False}},
    "would run the routers twice": {"moe": True, "activation_checkpointing": "whole_layer"},
    "d_modl": {"model": {"d_modl": 3}},
    "vocab size mismatch": {"model": {"vocab_size": 300, "embedding_size": 300}},
    "does not exist": {"data": {"paths": ["/nowhere/train.npy"]}},
    "no downstream task 'sciqq'": {"evaluators": [{"label": "sciqq", "type": "downstream"}]},
}


@pytest.mark.parametrize("sentence", REFUSALS)
def test_what_cannot_be_right_is_refused_in_a_sentence(train: Trainer, sentence: str) -> None:
    run = train(**REFUSALS[sentence])
    assert sentence in run.refusal
    assert "Traceback" not in run.log
    assert not run.metrics


def test_router_z_loss_may_be_null(train: Trainer) -> None:
    run = train(moe=True, model={"moe_zloss_weight": None, "activation_type": "polynorm"}, max_duration=2)
    assert "train/router_z_loss" not in run.metrics[2]
    assert run.metrics[2]["train/load_balancing_loss"] > 0


@pytest.mark.parametrize(
    ("hidden", "sentence"),
    [(None, "olmo is not on PYTHONPATH"), ("wandb", "wandb, which OLMo needs, is not installed")],
)
def test_what_is_missing_is_named(tree: Path, tmp_path: Path, hidden: str | None, sentence: str) -> None:
    hide = f"import sys; sys.modules[{hidden!r}] = None\n" if hidden else ""
    (tmp_path / "sitecustomize.py").write_text(hide)
    paths = [tmp_path, tree] if hidden else [tmp_path]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "polycom_ext.integrations.olmo.train"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith(f"polycom: error: {sentence}")
