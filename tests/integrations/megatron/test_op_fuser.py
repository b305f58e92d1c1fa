"""Megatron's MLP on Transformer Engine's operation fuser takes PolyCom's activations as operations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..transformer_engine.test_transformer_engine import WHEELS
from ..transformer_engine.test_transformer_engine import sources as sources
from .conftest import ENVIRONMENT

ROOT = Path(__file__).parents[3]


@pytest.mark.full
@pytest.mark.parametrize("sources", [list(WHEELS)[-1]], indirect=True)
def test_fused_layers_are_the_separate_ones(tree: Path, sources: Path) -> None:
    script = Path(__file__).with_name("op_fuser.py")
    environment = {**os.environ, **ENVIRONMENT, "POLYCOM_TE_SOURCES": str(sources)}
    environment["PYTHONPATH"] = os.pathsep.join((str(tree), str(ROOT)))
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-6000:]
    said = json.loads(finished.stdout.splitlines()[-1])
    assert max(said["differences"].values()) < 1e-5
    assert len(said["differences"]) == 3
    assert {"activation_func.weight", "activation_func.bias"} <= set(said["keys"])
    assert "parameters" in said["nothing to learn"]
    assert said["recomputed"] == [False, True]
