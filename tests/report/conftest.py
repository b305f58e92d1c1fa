"""Run directories as `polycom run` leaves them: specs and files of the real form, curves by arithmetic."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from polycom_ext import drawing

Metrics = dict[int, dict[str, float]]

DENSE: dict[str, Any] = {
    "num-layers": 4,
    "hidden-size": 192,
    "num-attention-heads": 4,
    "seq-length": 128,
    "global-batch-size": 16,
    "train-iters": 400,
    "train-data-path": ["build/demo/train"],
    "valid-data-path": ["build/demo/valid"],
}
MOE = {**DENSE, "num-experts": 4, "moe-router-topk": 2, "expert-model-parallel-size": 2}


def curve(step: int, floor: float) -> float:
    """A loss that falls from 7.6 = ln(2048) to about `floor` at step 400."""
    return floor + (7.6 - floor) * math.exp(-step / 25) + 0.9 * (1 / math.sqrt(1 + step / 20) - 0.218)


def metrics(
    floor: float, steps: int = 400, labels: tuple[str, ...] = ("validation",), tasks: tuple[str, ...] = ()
) -> Metrics:
    """What a trainer logs: training every 2 steps, validation every 50."""
    noise = random.Random(floor)
    logged: Metrics = {}
    for step in range(2, steps + 1, 2):
        logged[step] = {
            "train/loss": curve(step, floor - 0.1) + noise.gauss(0, 0.06),
            "train/grad_norm": 0.8,
            "train/learning_rate": 1e-3,
            "train/step_seconds": 0.3 + abs(noise.gauss(0, 0.01)),
        }
        if step % 50 == 0:
            for index, label in enumerate(labels):
                logged[step][f"valid/{label}/loss"] = curve(step, floor) + 0.1 * index
            for index, task in enumerate(tasks):
                logged[step][f"eval/{task}/acc"] = 0.2 + 0.05 * index + step / 4000 + (5 - floor) / 50
    return logged


def coefficients(
    activation: str, layers: int = 4, step: int = 400, order: int = 3, suffix: str = "mlp"
) -> dict[str, Any]:
    """Coefficients that moved a little from 1/order, more so in later layers."""
    entries = []
    for layer in range(layers):
        moved = 0.01 * (layer + len(activation) - 6)
        weight = [1 / order + moved * (-1) ** power for power in range(order)]
        entry: dict[str, Any] = {
            "name": f"decoder.layers.{layer}.{suffix}",
            "weight": weight,
            "bias": [-0.02 * layer],
        }
        if activation.startswith("polyprelu"):
            entry["slope"] = [0.25 - 0.05 * layer]
        entries.append(entry)
    return {"step": step, "activation": activation, "layers": entries}


RunMaker = Callable[..., Path]


@pytest.fixture(autouse=True)
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of fewer points, as nobody looks at them here."""
    for name in ("figure.dpi", "savefig.dpi"):
        monkeypatch.setitem(drawing._DATA["style"], name, 60)


@pytest.fixture
def make_run(tmp_path: Path) -> RunMaker:
    """make_run(name, activation, metrics, …) writes a run directory and returns its path."""

    def make(
        name: str,
        activation: str,
        logged: Metrics | None = None,
        *,
        options: dict[str, Any] | None = None,
        learned: dict[str, Any] | None = None,
        **spec: Any,
    ) -> Path:
        directory = tmp_path / "outputs" / name
        directory.mkdir(parents=True)
        resolved = {
            "name": name,
            "trainer": "megatron",
            "activation": activation,
            "ffn_width": 768,
            "processes_per_node": 1,
            "environment": {"OMP_NUM_THREADS": "2"},
            "megatron": DENSE if options is None else options,
            **spec,
        }
        resolved = {key: value for key, value in resolved.items() if value is not None}
        (directory / "run.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
        (directory / "command.sh").write_text(
            "#!/bin/sh\nexec python -m torch.distributed.run --standalone --nproc-per-node 1 \\\n"
            "    -m polycom_ext.integrations.megatron.pretrain \\\n    --num-layers 4\n"
        )
        versions = {
            "polycom-ext": "0.1.0",
            "python": "3.11.7",
            "torch": "2.13.0",
            "upstreams": {"megatron": "applied"},
            "attempts": [{"started": "2026-01-02T03:04:05+00:00", "from_step": None, "status": 0}],
        }
        (directory / "versions.json").write_text(json.dumps(versions))
        if learned is not None:
            (directory / "coefficients.json").write_text(json.dumps(learned))
        append(directory, logged or {})
        return directory

    return make


def append(directory: Path, logged: Metrics) -> None:
    """One attempt's lines."""
    with (directory / "metrics.jsonl").open("a") as file:
        for step, values in logged.items():
            file.write(json.dumps({"step": step, "metrics": values}) + "\n")
