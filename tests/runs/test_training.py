"""Real training through `polycom run` on Megatron's own loop, on invented data: killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from polycom_ext.cli import main
from polycom_ext.runs import record
from polycom_ext.runs.efficiency import CPU, model_flops, read
from polycom_ext.runs.record import Record

pytestmark = pytest.mark.usefixtures("without_transformers")
TINY = Path(__file__).parents[2] / "configs" / "tiny"
SMALL = {
    "num-layers": 2,
    "hidden-size": 64,
    "seq-length": 32,
    "max-position-embeddings": 32,
    "global-batch-size": 4,
    "micro-batch-size": 2,
    "train-data-path": None,
    "valid-data-path": None,
    "mock-data": True,
    "train-iters": 12,
    "lr-warmup-iters": 2,
    "save-interval": 4,
    "eval-interval": 6,
    "eval-iters": 1,
    "log-interval": 1,
    "tensorboard-log-interval": 1,
}


def write_spec(folder: Path, base: str, activation: str, **options: Any) -> Path:
    section = {**SMALL, **{key.replace("_", "-"): value for key, value in options.items()}}
    spec = {"extends": str(TINY / base), "activation": activation, "ffn_width": 96, "megatron": section}
    path = folder / f"{activation}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    """step -> metrics, without timings; a later line wins."""
    merged: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        logged = json.loads(line)
        merged.setdefault(logged["step"], {}).update(logged["metrics"])
    for values in merged.values():
        for name in (record.STEP_SECONDS, record.TOKENS_PER_SECOND, record.PEAK_MEMORY):
            values.pop(name, None)
    return merged


def kill_the_trainer_after_its_first_save(run_dir: Path, killed: list[int]) -> None:
    latest = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + 120
    while not latest.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run_dir / "checkpoints").encode() in words and b"polycom_ext.runs.torchrun" not in words:
            killed.append(int(path.parent.name))
            os.kill(killed[-1], signal.SIGKILL)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was killed after its first checkpoint and started again."""
    folder = tmp_path_factory.mktemp("resumed")
    spec, run_dir = write_spec(folder, "base-dense.yaml", "polynorm"), folder / "run"
    killed: list[int] = []
    watcher = threading.Thread(target=kill_the_trainer_after_its_first_save, args=(run_dir, killed))
    watcher.start()
    assert main(["run", str(spec), "--output", str(run_dir)]) == 1
    watcher.join()
    assert len(killed) == 1
    assert main(["run", str(spec), "--output", str(run_dir)]) == 0
    return run_dir


def test_a_killed_trainer_is_resumed_from_its_checkpoint_and_finishes(resumed: Path) -> None:
    versions = json.loads((resumed / "versions.json").read_text())
    first, second = versions["attempts"]
    assert (first["from_step"], first["status"]) == (None, -signal.SIGKILL)
    assert second["from_step"] in (4, 8)
    assert second["status"] == 0
    assert "megatron" in versions["upstreams"]
    logged = metrics(resumed)
    assert sorted(logged) == list(range(1, 13))
    assert {step for step in logged if "valid/loss" in logged[step]} == {6, 12}


def test_a_run_records_how_fast_it_is_and_what_memory_it_takes(
    resumed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    series = record.read_metrics(resumed / "metrics.jsonl").series
    seconds = series[record.STEP_SECONDS]
    assert len(seconds) >= 10  # Megatron times no first step
    assert series[record.TOKENS_PER_SECOND] == pytest.approx(
        {step: 4 * 32 / seconds[step] for step in seconds}
    )
    assert 2**26 < min(series[record.PEAK_MEMORY].values()) < 2**34
    reckoned = read(Record(resumed))
    assert reckoned is not None
    assert (reckoned.device, reckoned.devices, reckoned.peak_flops) == (CPU, 1, None)
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 96) + 64 * 2048
    assert reckoned.flops_per_token == model_flops(weights, layers=2, attention_width=64, sequence=32)
    assert main(["status", str(resumed)]) == 0
    assert "no MFU: no peak is known of CPU" in capsys.readouterr().out


@pytest.mark.long
def test_tensorboard_and_weights_and_biases_get_what_megatron_logs(tmp_path: Path) -> None:
    watched = {
        "tensorboard_dir": str(tmp_path / "tensorboard"),
        "wandb_project": "polycom",
        "wandb_exp_name": "tiny",
        "wandb_save_dir": str(tmp_path / "wandb"),
        "train_iters": 3,
    }
    spec, run_dir = write_spec(tmp_path, "base-dense.yaml", "polynorm", **watched), tmp_path / "run"
    offline = ["--set", "environment.WANDB_MODE=offline"]
    assert main(["run", str(spec), "--output", str(run_dir), *offline]) == 0
    [events] = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    [kept] = (tmp_path / "wandb").rglob("offline-run-*/run-*.wandb")
    for name in (b"lm loss", b"iteration-time"):
        assert name in events.read_bytes()
        assert name in kept.read_bytes()
    assert sorted(metrics(run_dir)) == [1, 2, 3]


@pytest.mark.full
def test_a_killed_and_resumed_run_is_the_straight_run(resumed: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "base-dense.yaml", "polynorm")
    assert main(["run", str(spec), "--output", str(tmp_path / "run")]) == 0
    straight, again = metrics(tmp_path / "run"), metrics(resumed)
    names = ("train/loss", "train/grad_norm", "train/learning_rate")
    assert [[straight[step][name] for name in names] for step in straight] == [
        [again[step][name] for name in names] for step in straight
    ]


@pytest.mark.full
def test_a_finished_run_that_is_started_again_adds_no_evaluation(
    resumed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As after a SIGKILL of `polycom run` alone: its trainer came to the end, and nobody noted that."""
    run_dir = tmp_path / "run"
    shutil.copytree(resumed, run_dir)
    versions = json.loads((run_dir / "versions.json").read_text())
    del versions["attempts"][-1]["status"]
    (run_dir / "versions.json").write_text(json.dumps(versions))
    spec = write_spec(tmp_path, "base-dense.yaml", "polynorm")
    assert main(["run", str(spec), "--output", str(run_dir)]) == 0
    assert "resuming from step 12" in capfd.readouterr().out
    assert (run_dir / "metrics.jsonl").read_text() == (resumed / "metrics.jsonl").read_text()


@pytest.mark.full
def test_a_run_whose_checkpoints_hold_no_readable_coefficients_is_complete(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(tmp_path, "base-dense.yaml", "polynorm", train_iters=3, ckpt_format="torch")
    for said in ("polynorm: finished in", "polynorm: already complete at step 3"):
        assert main(["run", str(spec), "--output", str(tmp_path / "run")]) == 0
        shown = capfd.readouterr()
        assert said in shown.out
    assert not (tmp_path / "run" / "coefficients.json").exists()


def megatron_state(run_dir: Path) -> str:
    versions = json.loads((run_dir / "versions.json").read_text())
    return str(versions["upstreams"]["megatron"]["state"])


@pytest.mark.full
def test_an_activation_that_upstream_knows_runs_unpatched_and_another_brings_its_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYCOM_UPSTREAM_DIR", str(tmp_path / "trees"))
    assert main(["upstream", "fetch", "megatron"]) == 0
    for activation, state in (("swiglu", "pristine"), ("polynorm", "applied")):
        run_dir = tmp_path / activation
        spec = write_spec(tmp_path, "base-dense.yaml", activation, train_iters=3)
        assert main(["run", str(spec), "--output", str(run_dir)]) == 0
        assert megatron_state(run_dir) == state


@pytest.mark.full
def test_a_combination_that_cannot_be_right_is_passed_on_as_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(tmp_path, "base-moe.yaml", "polynorm", moe_apply_probs_on_input=True, moe_router_topk=1)
    assert main(["run", str(spec), "--output", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("polycom run: polynorm: ")
    assert "--moe-apply-probs-on-input" in error
    assert error.count("\n") == 1


def initial_weights(folder: Path, base: str, activation: str) -> dict[str, torch.Tensor]:
    """The model's weights after one iteration at learning rate 0."""
    options = {"train_iters": 1, "lr": 0, "min_lr": 0, "lr_warmup_iters": 0, "eval_iters": 0}
    spec = write_spec(folder, base, activation, **options)
    run_dir = folder / activation
    assert main(["run", str(spec), "--output", str(run_dir)]) == 0
    plain = folder / f"{activation}.pt"
    dcp_to_torch_save(run_dir / "checkpoints" / "iter_0000001", plain)
    state = torch.load(plain, weights_only=False)
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not name.startswith("optimizer")
    }


@pytest.mark.full
@pytest.mark.parametrize(("base", "shared"), [("base-dense.yaml", 7), ("base-moe.yaml", 8)])
def test_models_that_differ_in_their_activation_start_from_the_same_shared_weights(
    tmp_path: Path, base: str, shared: int
) -> None:
    gated = initial_weights(tmp_path, base, "swiglu")
    plain = initial_weights(tmp_path, base, "polynorm")
    common = [name for name in gated if name in plain and gated[name].shape == plain[name].shape]
    assert len(common) == shared
    different = [name for name in common if not torch.equal(gated[name], plain[name])]
    assert different == []
    assert all(value.unique().numel() > 1 for name, value in gated.items() if "norm" not in name)
