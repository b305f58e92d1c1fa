"""The benchmark script runs from end to end and writes what it says."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from .scripts import BENCHMARKS, script

SCRIPT = BENCHMARKS / "activations.py"
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


ACCEPT = SCRIPT.with_name("accept.py")


@pytest.fixture
def accept() -> Any:
    return script("accept")


@pytest.fixture
def checks() -> Any:
    return script("checks")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_acceptance_needs_a_gpu_or_is_told_to_do_without() -> None:
    result = subprocess.run([sys.executable, str(ACCEPT)], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "torch sees no GPU here; --device cpu --short" in result.stderr


def test_the_page_of_an_acceptance_sets_the_model_beside_the_measurement(
    accept: Any, output: Path, tmp_path: Path
) -> None:
    measured = tmp_path / "measured.csv"
    lines = output.with_suffix(".csv").read_text().splitlines()
    lines = [line for line in lines if line.startswith(("provider", "polycom,backward,bfloat16,4,96"))]
    measured.write_text("\n".join(lines).replace(",96,", ",8256,"))
    table = accept.beside_the_model(measured, "NVIDIA H100 80GB HBM3")
    (line,) = [line for line in table.splitlines() if line.startswith("| backward | 8256 |")]
    assert float(line.split("|")[3]) >= 0.85


def test_the_steps_of_an_acceptance_have_eight_minutes(accept: Any) -> None:
    assert sum(accept.SECONDS.values()) <= 480
    assert accept.commands(Path("x"), "cuda:0", False).keys() == accept.SECONDS.keys()


def test_a_step_that_takes_too_long_is_ended_with_what_it_started(accept: Any, tmp_path: Path) -> None:
    accept.SECONDS = {"build": 1}
    start = time.monotonic()
    command = ["sh", "-c", "sleep 30 & echo $!; wait"]  # as nvcc starts its compilers
    step = accept.run(tmp_path / "log", "build", command, dict(os.environ))
    assert (step.status, step.succeeded) == ("ended after 1 s", False)
    assert time.monotonic() - start < 20
    with pytest.raises(ProcessLookupError):
        _wait_for_the_end(int(step.output.split()[0]))


def test_a_step_that_cannot_be_started_is_told(accept: Any, tmp_path: Path) -> None:
    step = accept.run(tmp_path / "log", "build", ["/no/such/program"], dict(os.environ))
    assert not step.succeeded
    assert "cannot be started" in step.status
    assert "/no/such/program" in (tmp_path / "log").read_text()


def _wait_for_the_end(pid: int) -> None:
    for _ in range(100):
        os.kill(pid, 0)
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            raise ProcessLookupError
        time.sleep(0.05)


def wrong(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """One row is another's, as an index that overflows has it."""
    return lambda x, *rest, **variants: function(x, *rest, **variants).roll(1, 0)


def test_a_check_tells_what_is_wrong_and_the_others_go_on(
    checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of operations that are wrong, breaking or not there."""
    monkeypatch.setattr(checks.functional, "poly_norm", wrong(checks.functional.poly_norm))
    monkeypatch.setitem(checks.CHECKS, "no rows", lambda setting: 1 // 0)
    here = checks.Setting(torch.device("cpu"), short=True)
    found = {one.check: one for one in checks.made(list(checks.CHECKS), here)}
    assert {name for name, one in found.items() if one.status == "failed"} >= {
        "misaligned tensors",
        "no rows",
    }
    assert "y is off by" in found["misaligned tensors"].text
    assert "row 2 of width 37" in found["NaN and infinity"].text
    assert found["no rows"].text.startswith("ZeroDivisionError")
    assert found["CUDA graphs"].status == "skipped"


def test_every_kind_of_difference_is_found(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that cannot fail is none: each is given an operation with the fault that it is about."""
    here = checks.Setting(torch.device("cpu"), short=True)
    true = checks.functional.poly_norm
    calls = iter(range(10_000))

    def drifting(x: torch.Tensor, *rest: torch.Tensor, **variants: torch.Tensor) -> torch.Tensor:
        return true(x, *rest, **variants) * (1 + next(calls) % 2 / 64)

    def cut(x: torch.Tensor, *rest: torch.Tensor, **variants: torch.Tensor) -> torch.Tensor:
        return torch.cat([true(x, *rest, **variants)[:4], torch.zeros_like(x[4:])])

    for check, function in ((checks.determinism, drifting), (checks.huge, cut)):
        monkeypatch.setattr(checks.functional, "poly_norm", function)
        with pytest.raises(AssertionError, match="differs by"):
            check(here)
    if "cpu" not in checks.library.devices:
        pytest.skip(f"the fused operations are not there: {checks.library.problem}")
    monkeypatch.setitem(checks.FUNCTIONS, "poly_norm", (cut, checks.reference.poly_norm))
    monkeypatch.setattr(checks, "SHORT_WIDTHS", (37,))
    with pytest.raises(AssertionError, match=r"wrong: poly_norm-1 .* is off by"):
        checks.instances(here)


@pytest.fixture
def pretended(checks: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A setting on a "GPU" whose memory and operations are the CPU's: what is torch.cuda's does nothing."""
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda other: 1.0)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = {
        **dict.fromkeys(("Stream", "current_stream"), lambda device: stream),
        **dict.fromkeys(("stream", "graph"), lambda of: contextlib.nullcontext()),
        **dict.fromkeys(("_sleep", "synchronize"), lambda *of: None),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "Event": lambda enable_timing: event,
        "device_count": lambda: 1,
        "get_device_capability": lambda device: (9, 0),
    }
    for name, one in cuda.items():
        monkeypatch.setattr(torch.cuda, name, one)
    monkeypatch.setattr(checks.Setting, "on_gpu", lambda self: None)
    return checks.Setting(torch.device("cpu"), short=True)


def test_the_checks_of_gpus_run_with_the_device_replaced(
    checks: Any, pretended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that replays nothing is found out."""
    te: Any = ModuleType("transformer_engine.pytorch")
    te.ops = SimpleNamespace(Sequential=nn.Sequential, Linear=nn.Linear)
    te.autocast = lambda enabled: contextlib.nullcontext()
    room: Any = ModuleType("polycom_ext.integrations.transformer_engine")
    room.operation_of = lambda module: module
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    for module in (te, room):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys.modules["transformer_engine"], "pytorch", te, raising=False)
    names = [
        name for name in checks.CHECKS if name.startswith(("another", "a second", "CUDA", "Transformer"))
    ]
    found = {one.check: (one.status, one.text) for one in checks.made(names, pretended)}
    assert found["another stream"][0] == "passed"
    assert found["a second GPU"] == ("skipped", "there is one GPU")
    assert found["CUDA graphs"][0] == "failed"
    assert "replayed: y differs by" in found["CUDA graphs"][1]
    for recipe in ("bf16", "FP8"):
        status, text = found[f"Transformer Engine, {recipe}"]
        assert (status, text) == (
            "passed",
            "y differs by 0.0e+00, gradient of x differs by 0.0e+00, TE 1.00 ms, plain 1.00 ms",
        )


@pytest.mark.full
def test_an_acceptance_runs_from_end_to_end(tmp_path: Path) -> None:
    """In a copy, on the CPU, whose operations are there already; nothing can be compiled."""
    root = tmp_path / "copy"
    for name in ("polycom_ext", "benchmarks", "patches"):
        shutil.copytree(SCRIPT.parents[1] / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"CXX": "false", "PYTHONPATH": str(root)}
    command = [sys.executable, "benchmarks/accept.py", "--device", "cpu", "--short", "--output", "out"]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    csv_file, log, page, plot = sorted((root / "out").iterdir())
    assert [path.suffix for path in (csv_file, log, page, plot)] == [".csv", ".log", ".md", ".png"]
    text = page.read_text()
    steps = {"doctor": "0", "build": "2", "checks": "0", "benchmark": "0"}
    for step, status in steps.items():
        assert f"| {step} | {status} |" in text
    assert "| sanitizer | left out: compute-sanitizer" in text
    assert "the fused operations were not built: false failed" in text
    assert text.count("| passed |") == 6
    assert text.count("| failed |") == 0
    assert "## Activations on" in text
    assert "| forward | 1536 | ? |" in text
    assert 'polycom,"block, recomputing",bfloat16' in csv_file.read_text()
