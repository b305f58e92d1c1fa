"""The benchmark script runs from end to end and writes what it says."""

from __future__ import annotations

import csv
import runpy
import subprocess
import sys
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
