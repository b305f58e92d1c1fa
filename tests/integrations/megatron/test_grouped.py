"""TEGroupedMLP and SequentialMLP: the same function, one activation a block, the same checkpoint keys."""

import json
import os
import subprocess
import sys
from pathlib import Path

from .conftest import ENVIRONMENT


def test_grouped_experts_are_the_sequential_ones(tree: Path) -> None:
    script = Path(__file__).with_name("grouped.py")
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(tree)}
    finished = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    said = json.loads(finished.stdout.splitlines()[-1])
    assert max(said["differences"].values()) < 1e-6
    assert said["parameters"] == [2, 2]
    assert said["keys"][0] == said["keys"][1] != []
