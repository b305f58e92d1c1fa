"""The paper's runs on Megatron train in small, in their own layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from polycom_ext.cli import main
from polycom_ext.runs.adapter import find
from polycom_ext.runs.spec import Spec

from ..integrations.megatron.conftest import Trainer, train, tree  # noqa: F401  # fixtures
from .conftest import assert_trains, rehearsal, runs

STEPS = 10
FEWER_EXPERTS = "megatron.expert-model-parallel-size=2"
"""Two processes where the run has eight: each of these costs seconds."""


def trains(trainer: Trainer, spec: Spec, folder: Path, steps: int = STEPS) -> None:
    _, _, *options = find(spec.trainer).arguments(spec, folder)
    folder.mkdir()
    assert trainer.exactly(*options, processes=spec.world_size).statuses == [0] * spec.world_size
    assert_trains(spec, folder, steps)


@pytest.mark.parametrize(("name", "activation"), runs("megatron"))
def test_a_run_trains_in_small(
    train: Trainer,  # noqa: F811
    in_text: Path,
    tmp_path: Path,
    name: str,
    activation: str,
) -> None:
    shorter = [f"megatron.train-iters={STEPS}", f"megatron.save-interval={STEPS}"]
    fewer = [FEWER_EXPERTS] if "moe" in name else []
    trains(train, rehearsal(name, activation, *shorter, *fewer), tmp_path / "run")


@pytest.mark.long
def test_all_eight_ranks_of_the_experts_train(train: Trainer, in_text: Path, tmp_path: Path) -> None:  # noqa: F811
    spec = rehearsal("moe-1b-7b/megatron", "polynorm")
    assert spec.world_size == 8
    trains(train, spec, tmp_path / "run", 20)


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        "tensor-model-parallel-size=2 sequence-parallel=true",
        "pipeline-model-parallel-size=2 num-virtual-stages-per-pipeline-rank=2 global-batch-size=256",
        "recompute-granularity=selective recompute-modules=[mlp_act]",
    ],
)
def test_a_layout_of_the_users_trains(train: Trainer, in_text: Path, tmp_path: Path, changes: str) -> None:  # noqa: F811
    options = [f"megatron.{change}" for change in changes.split()]
    trains(train, rehearsal("dense-1b/table-1", "polynorm", *options), tmp_path / "run", 20)


@pytest.mark.long
def test_the_command_rehearses_a_run(
    in_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = "configs/dense-1b/table-1.yaml"
    command = ["run", config, "--rehearse", "--set", "activation=polynorm", "--output", str(tmp_path / "run")]
    assert main(command) == 0
    assert main(command) == 0
    assert "already complete at step 20" in capfd.readouterr().out
    assert main(["status", str(tmp_path / "run")]) == 0
    assert "dense-1b-polynorm-rehearsal" in capfd.readouterr().out
