"""The benchmark script runs from end to end and writes what it says."""

from __future__ import annotations

import csv
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "activations.py"
PROVIDERS = ["polycom", "eager", "authors", "gelu", "swiglu", "liger"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "new" / "small"
    options = [
        "--rows",
        "4",
        "--widths",
        "48",
        "96",
        "--hidden",
        "32",
        "--repetitions",
        "3",
        "--device",
        "cpu",
    ]
    command = [sys.executable, str(SCRIPT), *options, "--output", str(path), "--providers", *PROVIDERS]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "liger: skipped (needs a GPU" in result.stderr
    return path


def test_every_provider_width_type_and_mode_is_a_row(output: Path) -> None:
    with output.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["provider"], row["mode"], row["dtype"], row["width"]) for row in rows}
    assert len(found) == len(rows)
    expected = set()
    for width in ("48", "96"):
        for dtype in ("float32", "bfloat16"):
            expected.add(("copy", "forward", dtype, width))
            for provider in ("polycom", "eager", "authors", "gelu", "swiglu"):
                expected |= {(provider, mode, dtype, width) for mode in ("forward", "backward", "both")}
                if dtype == "bfloat16":
                    expected.add((provider, "block", dtype, width))
        expected.add(("polycom", "block, recomputing", "bfloat16", width))
    assert found == expected
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])


def test_the_table_names_its_conditions_and_the_plot_is_there(output: Path) -> None:
    text = output.with_suffix(".md").read_text()
    assert "--widths 48 96" in text
    assert "torch 2." in text
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_the_command_for_a_gpu_sets_the_model_beside_the_measurement(output: Path, tmp_path: Path) -> None:
    script = SCRIPT.parent / "gpu.py"
    if not torch.cuda.is_available():
        result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert "torch sees no GPU here" in result.stderr
    measured = tmp_path / "measured.csv"
    lines = output.with_suffix(".csv").read_text().splitlines()
    lines = [line for line in lines if line.startswith(("provider", "polycom,backward,bfloat16,4,96"))]
    measured.write_text("\n".join(lines).replace(",96,", ",8256,"))
    table = runpy.run_path(str(script))["beside_the_model"](measured, "NVIDIA H100 80GB HBM3")
    (line,) = [line for line in table.splitlines() if line.startswith("backward 8256 ")]
    assert float(line.split()[2]) >= 0.85


def test_a_step_on_a_gpu_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    run = runpy.run_path(str(SCRIPT.parent / "gpu.py"))["run"]
    run.__globals__["SECONDS"] = {"build": 1}
    start = time.monotonic()
    command = ["sh", "-c", "sleep 30 & echo $!; wait"]  # as nvcc starts its compilers
    assert not run(tmp_path / "log", "build", command, dict(os.environ))
    assert time.monotonic() - start < 20
    _, pid, said, *_ = (tmp_path / "log").read_text().splitlines()
    assert said == "" or said.startswith("build: status ended after 1 s")
    with pytest.raises(ProcessLookupError):
        _wait_for_the_end(int(pid))


def _wait_for_the_end(pid: int) -> None:
    for _ in range(100):
        os.kill(pid, 0)
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            raise ProcessLookupError
        time.sleep(0.05)


REHEARSAL = """
import sys
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "NVIDIA H100 80GB HBM3"
torch.cuda.get_device_capability = lambda: (9, 0)
sys.path.insert(0, "benchmarks")
import gpu
gpu.WIDTHS, gpu.TESTS = (1536,), ("tests/test_functional.py", "-k", "mistakes")
sys.exit(gpu.main())
"""


@pytest.mark.full
def test_the_command_for_a_gpu_runs_from_end_to_end(tmp_path: Path) -> None:
    """In a copy, on the CPU, which the benchmark takes by itself; nothing can be compiled there."""
    root = tmp_path / "copy"
    for name in ("polycom_ext", "benchmarks", "tests"):
        shutil.copytree(SCRIPT.parents[1] / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(SCRIPT.parents[1] / name, root / name)
    environment = os.environ | {"CXX": "false", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", REHEARSAL, "--output", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    (log,) = (tmp_path / "out").glob("*-nvidia-h100-80gb-hbm3.log")
    text = log.read_text()
    assert "the fused operations were not built: false failed" in text
    for said in ("build: status 2", "tests: status 0", "compiled: skipped", "benchmark: status 0"):
        assert said in text
    measured = [
        line.split() for line in text.splitlines() if line.startswith(("forward 1536", "backward 1536"))
    ]
    assert [float(line[2]) for line in measured] == [1.0, 1.0]
    assert all(float(line[3]) > 0 for line in measured)
