"""`polycom run` on OLMo, from a spec to what a run leaves."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from polycom_ext.cli import main

from .conftest import MODEL

FILES = 1274
"""As many as the released OLMoE's configuration lists, each with a path of about 138 characters."""


@pytest.mark.full
def test_a_run_starts_with_the_released_list_of_data_files(
    inputs: dict[str, Any], tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokens = np.fromfile(inputs["data"]["paths"][0], dtype="<u2")
    paths = [tmp_path / f"{'x' * (128 - len(str(tmp_path)))}{i:05}.npy" for i in range(FILES)]
    for path in paths:
        tokens[:64].tofile(path)
    options = {key: value for key, value in inputs.items() if key in ("tokenizer", "optimizer", "scheduler")}
    options |= {
        "model": {key: value for key, value in MODEL.items() if key != "mlp_hidden_size"},
        "data": {"paths": [str(path) for path in paths], "drop_last": True},
        "global_train_batch_size": 4,
        "device_train_microbatch_size": 4,
        "max_duration": 2,
        "precision": "fp32",
        "no_pre_train_checkpoint": True,
    }
    spec = {"trainer": "olmo", "activation": "polynorm", "ffn_width": 128, "olmo": options}
    spec["environment"] = {"OMP_NUM_THREADS": 1}
    Path("long.yaml").write_text(yaml.safe_dump(spec))
    assert sum(len(str(path)) for path in paths) > 170_000
    assert main(["run", "long.yaml"]) == 0
    run_dir = tmp_path / "outputs" / "long"
    assert json.loads((run_dir / "coefficients.json").read_text())["step"] == 2
    metrics = run_dir / "metrics.jsonl"
    trained = len(metrics.read_text().splitlines())
    (run_dir / "checkpoints").rename(tmp_path / "away")
    subprocess.run(["sh", str(run_dir / "command.sh")], check=True, capture_output=True, timeout=120)
    assert len(metrics.read_text().splitlines()) == 2 * trained
