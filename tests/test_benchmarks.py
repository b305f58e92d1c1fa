"""The benchmark script runs from end to end and writes what it says."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from polycom_ext import activations, upstream
from polycom_ext.ops.polynomial import library
from polycom_ext.ops.polynomial.inputs import Inputs

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
    monkeypatch.setattr(sys.modules["numerics"], "SHORT_WIDTHS", (37,))
    here = checks.Setting(torch.device("cpu"), short=True)
    found = {name: checks.made(name, here) for name in checks.CHECKS}
    assert {name for name, one in found.items() if one.status == "failed"} >= {
        "misaligned tensors",
        "no rows",
    }
    assert "y is off by" in found["misaligned tensors"].text
    assert "row 2 of width 37" in found["NaN and infinity"].text
    assert found["no rows"].text.startswith("ZeroDivisionError")
    assert found["CUDA graphs"].status == "skipped"


def test_checks_go_on_behind_one_that_ended_its_process_or_lost_its_gpu(
    checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = checks.Setting(torch.device("cpu"), short=True)
    monkeypatch.setattr(checks, "CHECKS", {name: lambda setting: "fine" for name in "abcd"})
    monkeypatch.setitem(checks.CHECKS, "b", lambda setting: 1 // 0)
    monkeypatch.setattr(checks, "_works", lambda device: False)
    told: list[list[str]] = []
    results = [checks.Result("a", "begun"), *map(checks.Result, "bcd")]

    def go_on() -> bool:
        ended: bool = checks.make(results, here, lambda now: told.append([one.status for one in now]))
        return ended

    assert not go_on()
    assert told[-1] == ["failed", "failed", "not made", "not made"]
    assert results[0].text == "its process ended"
    assert go_on()
    assert told[-2:] == [["failed", "failed", "passed", "begun"], ["failed", "failed", "passed", "passed"]]


BREAKING = """
import os, sys, time
sys.path[:0] = [{benchmarks!r}]
import checks
checks.MOST_SECONDS = 1
checks.CHECKS = {{
    "first": lambda setting: "fine",
    "crash": lambda setting: os.abort(),
    "hang": lambda setting: time.sleep(60),
    "last": lambda setting: "fine",
}}
sys.exit(checks.main())
"""


@pytest.mark.full
def test_a_check_that_crashes_or_hangs_costs_an_acceptance_that_check_only(
    accept: Any, tmp_path: Path
) -> None:
    script = tmp_path / "breaking.py"
    script.write_text(BREAKING.format(benchmarks=str(BENCHMARKS)))
    results = tmp_path / "checks.json"
    command = [sys.executable, str(script), "--device", "cpu", "--output", str(results)]
    step = accept.run_checks(tmp_path / "log", command, dict(os.environ))
    assert not step.succeeded
    found = {one["check"]: (one["status"], one["text"]) for one in json.loads(results.read_text())}
    ended = ("failed", "its process ended")
    assert found == {"first": ("passed", "fine"), "crash": ended, "hang": ended, "last": ("passed", "fine")}
    assert "Fatal Python error: Aborted" in step.output
    assert "Timeout (0:00:01)!" in step.output


def test_checks_without_any_result_are_not_tried_again(accept: Any, tmp_path: Path) -> None:
    """As where torch cannot be imported, or crashes at each start."""
    results, log = tmp_path / "checks.json", tmp_path / "log"
    results.write_text(json.dumps([{"check": "a", "status": "not made"}]))
    accept.run_checks(log, ["sh", "-c", "kill -SEGV $$", "sh", "--output", str(results)], dict(os.environ))
    assert log.read_text().count("checks: status -11") == 2


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("echo '========= Error: Device not supported'; exit 1", "left out: compute-sanitizer does not"),
        ("sleep 20", "left out: not at its end, ended after 1 s"),
        ("exit 9", "9"),
        ("exit $((PYTORCH_NO_CUDA_MEMORY_CACHING - 1))", "0"),
    ],
)
def test_the_sanitizer_fails_an_acceptance_by_what_it_finds_only(
    accept: Any, tmp_path: Path, script: str, status: str
) -> None:
    accept.SECONDS = {"sanitizer": 1}
    step = accept.under_sanitizer(tmp_path / "log", ["sh", "-c", script], dict(os.environ))
    assert step.status.startswith(status)
    assert step.succeeded == (status != "9")


def test_every_kind_of_difference_is_found(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that cannot fail is none: each is given an operation with the fault that it is about."""
    here = checks.Setting(torch.device("cpu"), short=True)
    true, quantize = checks.functional.poly_norm, sys.modules["numerics"].quantized.quantize
    calls = iter(range(10_000))

    def drifting(x: torch.Tensor, *rest: torch.Tensor, **variants: torch.Tensor) -> torch.Tensor:
        return true(x, *rest, **variants) * (1 + next(calls) % 2 / 64)

    def cut(x: torch.Tensor, *rest: torch.Tensor, **variants: torch.Tensor) -> torch.Tensor:
        return torch.cat([true(x, *rest, **variants)[:4], torch.zeros_like(x[4:])])

    for check, function in ((checks.determinism, drifting), (checks.huge, cut)):
        monkeypatch.setattr(checks.functional, "poly_norm", function)
        with pytest.raises(AssertionError, match="differs by"):
            check(here)
    if "cpu" not in library.devices:
        pytest.skip(f"the fused operations are not there: {library.problem}")
    numerics = sys.modules["numerics"]
    monkeypatch.setitem(numerics.FUNCTIONS, "poly_norm", (cut, checks.reference.poly_norm))
    monkeypatch.setattr(numerics, "SHORT_WIDTHS", (37,))
    with pytest.raises(AssertionError, match=r"wrong: poly_norm-1 .* is off by"):
        checks.instances(here)
    with pytest.raises(AssertionError, match=r"poly_norm-3 .* 3542 rows of width 37 plain: y is off by"):
        checks.many_rows(here)
    monkeypatch.setattr(numerics, "Inputs", lambda x, *rest: Inputs(x.roll(1, 0), *rest))
    with pytest.raises(AssertionError, match="width 74: y is off by"):
        checks.sharded_rows(here)
    monkeypatch.setattr(numerics, "Inputs", Inputs)
    for field in ("data", "scale_inv", "amax"):

        def off(y: torch.Tensor, target: Any, field: str = field) -> None:
            quantize(y, target)
            if getattr(target, field) is not None:
                getattr(target, field).view(-1)[0] += 1

        monkeypatch.setattr(numerics.quantized, "quantize", off)
        with pytest.raises(AssertionError, match=rf"TENSOR .* {field} differs at 1 places"):
            checks.eight_bits(here)


class OnCpu(TorchFunctionMode):
    """Whoever asks for memory of a GPU is given the CPU's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def home(value: Any) -> Any:
            gpu = isinstance(value, torch.device) and value.type == "cuda"
            return torch.device("cpu") if gpu else value

        return func(*map(home, args), **{name: home(value) for name, value in (kwargs or {}).items()})


class GeneratorOnCpu(torch.Generator):
    def __new__(cls, device: object = None) -> Any:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A "GPU" whose memory and operations are the CPU's: what is torch.cuda's does nothing."""
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda other: 1.0)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    idle = ("_sleep", "synchronize", "set_device", "reset_peak_memory_stats")

    def each(names: tuple[str, ...], give: Callable[[], object]) -> dict[str, Any]:
        return {name: lambda *of: give() for name in names}  # functions of their own: dynamo tells them apart

    cuda: dict[str, Any] = {
        **each(("Stream", "current_stream"), lambda: stream),
        **each(("stream", "graph"), contextlib.nullcontext),
        **each(("memory_allocated", "max_memory_allocated"), lambda: 0),
        **each(idle, lambda: None),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "Event": lambda enable_timing: event,
        "device_count": lambda: 1,
        "get_device_capability": lambda device: (9, 0),
        "get_device_name": lambda device: "NVIDIA H100 80GB HBM3",
        "mem_get_info": lambda device: (2**37, 2**37),
    }
    for name, one in cuda.items():
        assert hasattr(torch.cuda, name)  # of this torch
        monkeypatch.setattr(torch.cuda, name, one)
    monkeypatch.setattr(torch, "Generator", GeneratorOnCpu)
    monkeypatch.setattr(library, "gpu_problem", lambda index: "")
    monkeypatch.setattr(library, "cuda_architectures", lambda: ["sm_90"])
    if library.devices:
        monkeypatch.setattr(library, "devices", frozenset({"cpu", "cuda"}))
    with OnCpu():
        yield torch.device("cuda:0")


def test_the_checks_run_with_the_device_replaced(
    checks: Any, pretended: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them; a graph that replays nothing is found out."""
    if not library.devices:
        pytest.skip(f"the fused operations are not there: {library.problem}")
    te: Any = ModuleType("transformer_engine.pytorch")
    te.ops = SimpleNamespace(Sequential=nn.Sequential, Linear=nn.Linear)
    te.autocast = lambda enabled: contextlib.nullcontext()
    room: Any = ModuleType("polycom_ext.integrations.transformer_engine")
    room.operation_of = lambda module: module
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    for module in (te, room):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys.modules["transformer_engine"], "pytorch", te, raising=False)
    monkeypatch.setattr(sys.modules["numerics"], "SHORT_WIDTHS", (37,))
    setting = checks.Setting(pretended, short=True)
    found = {name: (one.status, one.text) for name in checks.CHECKS for one in [checks.made(name, setting)]}
    assert [name for name, (status, _) in found.items() if status == "failed"] == ["CUDA graphs"]
    assert [name for name, (status, _) in found.items() if status == "skipped"] == ["a second GPU"]
    assert found["a second GPU"] == ("skipped", "there is one GPU")
    assert "replayed: y differs by" in found["CUDA graphs"][1]
    for recipe in ("bf16", "FP8"):
        status, text = found[f"Transformer Engine, {recipe}"]
        assert (status, text) == (
            "passed",
            "y differs by 0.0e+00, gradient of x differs by 0.0e+00, TE 1.00 ms, plain 1.00 ms",
        )


def test_the_benchmark_runs_with_the_device_replaced(
    pretended: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        "--rows 4 --widths 48 --hidden 32 --repetitions 3 --dtypes bfloat16 --providers polycom gelu swiglu"
    )
    output = tmp_path / "gpu"
    monkeypatch.setattr(
        sys, "argv", ["x", *options.split(), "--device", str(pretended), "--output", str(output)]
    )
    module: Any = script("activations")
    monkeypatch.setattr(module, "FLUSHED", 8)
    assert module.main() == 0
    with output.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["p50_ms"] for row in rows} == {"1.0"}  # by the events
    assert {row["peak_mib"] for row in rows if row["provider"] != "copy"} == {"0.0"}
    assert "on NVIDIA H100 80GB HBM3" in output.with_suffix(".md").read_text()


@pytest.mark.parametrize(("architecture", "built"), [("sm_90", True), ("sm_80", False)])
def test_operations_that_are_there_for_this_gpu_are_not_built_again(
    accept: Any,
    pretended: torch.device,
    architecture: str,
    built: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(library, "cuda_architectures", lambda: [architecture, "compute_80"])
    monkeypatch.setattr(sys, "argv", ["-c", str(pretended)])
    exec(accept.PROBE, {})
    assert json.loads(capsys.readouterr().out) == ["NVIDIA H100 80GB HBM3", "9.0", built]


@pytest.fixture
def small(tmp_path: Path) -> Any:
    """The benchmark's module, and arguments of a small run of it in this process."""
    module: Any = script("activations")
    module.arguments = SimpleNamespace(
        rows=4,
        widths=[48, 96],
        dtypes=["float32"],
        providers=["gelu", "polycom"],
        repetitions=3,
        rounds=2,
        seconds=60.0,
        block=False,
    )
    return module


def test_a_provider_that_fails_is_told_and_the_others_go_on(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape[1])
        if x.shape[1] == 48:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.\nMore.")
        return x.relu()

    calls: list[int] = []
    monkeypatch.setattr(nn.GELU, "forward", scarce)
    found = list(small.measure(small.arguments, torch.device("cpu")))
    [failure] = [one for one in found if isinstance(one, small.Failure)]
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert failure == small.Failure("gelu", "float32", 48, reason)
    assert calls.count(48) == 1  # not in the second round
    rows = {(one.provider, one.width) for one in found if isinstance(one, small.Row)}
    assert rows == {(name, width) for name in ("copy", "polycom", "gelu") for width in (48, 96)} - {
        ("gelu", 48)
    }


def test_a_failure_of_ours_is_the_exit_status_and_in_the_page(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "--rows 4 --widths 48 --repetitions 3 --rounds 1 --dtypes float32 --providers polycom gelu"
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["x", *options.split(), "--device", "cpu", "--output", str(output)])
    monkeypatch.setattr(small.functional, "poly_norm", lambda *of: 1 // 0)
    assert small.main() == 1
    page = output.with_suffix(".md").read_text()
    assert "Failed: polycom, float32, width 48: ZeroDivisionError" in page
    assert "| gelu | backward |" in page


def test_a_backward_that_writes_into_its_gradient_is_given_the_same_each_time(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Liger's does, by its default."""

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.append(grad.clone())
            return grad.mul_(2)

    seen: list[torch.Tensor] = []
    monkeypatch.setattr(small, "_liger", lambda x, *rest: InPlace.apply(x))
    monkeypatch.setattr(small, "_missing", lambda name, device: "")
    small.arguments.providers, small.arguments.rounds, small.arguments.widths = ["liger"], 1, [48]
    assert all(isinstance(one, small.Row) for one in small.measure(small.arguments, torch.device("cpu")))
    assert len(seen) > 10
    assert all(torch.equal(one, seen[0]) for one in seen)


def test_a_measurement_has_fewer_repetitions_where_it_takes_too_long(small: Any) -> None:
    device = torch.device("cpu")
    calls: list[int] = []
    assert len(small.Timer(device, 9, 0.0)(lambda: calls.append(1))[0]) == small.LEAST_REPETITIONS
    assert len(small.Timer(device, 9, 60.0)(lambda: calls.append(1))[0]) == 9
    assert len(small.Timer(device, 2, 0.0)(lambda: calls.append(1))[0]) == 2


@pytest.mark.full
def test_each_shape_is_compiled_for_itself(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one would else be compiled for any, and a ninth not at all."""

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        widths.extend(one.shape[1] for one in inputs if isinstance(one, torch.Tensor) and one.dim() == 2)
        return module.forward

    widths: list[Any] = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    small.arguments.widths = list(range(16, 27))
    small.arguments.providers, small.arguments.rounds, small.arguments.repetitions = ["compiled"], 1, 2
    found = list(small.measure(small.arguments, torch.device("cpu")))
    assert not any(isinstance(one, small.Failure) for one in found)
    assert {width for width in widths if type(width) is int} >= set(small.arguments.widths)


@pytest.mark.full
def test_the_formula_compiles_where_there_is_a_compiler(small: Any) -> None:
    if reason := small._missing("compiled", torch.device("cpu")):
        pytest.skip(reason)
    small.arguments.providers, small.arguments.rounds, small.arguments.widths = ["compiled"], 1, [48]
    found = list(small.measure(small.arguments, torch.device("cpu")))
    assert {one.mode for one in found if one.provider == "compiled"} == {"forward", "backward", "both"}


@pytest.mark.full
def test_an_acceptance_runs_from_end_to_end(tmp_path: Path) -> None:
    """In a copy, on the CPU, whose operations are there already; nothing can be compiled."""
    root = tmp_path / "copy"
    upstream.ensure_applied("megatron")
    for name in ("polycom_ext", "benchmarks", "patches", "configs"):
        shutil.copytree(SCRIPT.parents[1] / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / ".upstream").mkdir()
    (root / ".upstream" / "megatron").symlink_to(upstream.tree("megatron"))
    environment = os.environ | {"CXX": "false", "PYTHONPATH": str(root)}
    command = [sys.executable, "benchmarks/accept.py", "--device", "cpu", "--short", "--output", "out"]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    csv_file, log, page, plot = sorted((root / "out").iterdir())
    assert [path.suffix for path in (csv_file, log, page, plot)] == [".csv", ".log", ".md", ".png"]
    text = page.read_text()
    steps = {"doctor": "0", "build": "2", "checks": "0", "benchmark": "0", "overhead": "0", "train": "0"}
    for step, status in steps.items():
        assert f"| {step} | {status} |" in text
    assert "| sanitizer | left out: compute-sanitizer" in text
    assert "the fused operations were not built: false failed" in text
    assert text.count("| passed |") == 9
    assert text.count("| failed |") == 0
    assert "## Activations on" in text
    assert "## What an activation adds" in text
    assert re.search(r"^one-gpu-polynorm-rehearsal\n  state +finished$", text, re.MULTILINE)
    assert "| forward | 1536 | ? |" in text
    assert 'polycom,"block, recomputing",bfloat16' in csv_file.read_text()


@pytest.mark.full
def test_the_layer_of_megatrons_is_measured_fused_and_separate(tmp_path: Path) -> None:
    output = tmp_path / "new" / "layer"
    command = [sys.executable, str(BENCHMARKS / "megatron_layer.py"), "--short", "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with output.with_suffix(".csv").open() as file:
        found = {
            tuple(row[name] for name in ("provider", "mode", "part", "dtype")) for row in csv.DictReader(file)
        }
    axes = (("fused", "separate"), ("dense", "expert"), ("layer", "activation"), ("float32", "bfloat16"))
    assert found == set(product(*axes))
    page = output.with_suffix(".md").read_text()
    assert page in result.stdout
    assert "8 tokens, hidden 32, width 64" in page
    assert page.count("| layer |") == 1 + 4


def test_both_forms_of_the_layer_are_the_same_function() -> None:
    """Else their times cannot be compared."""
    module: Any = script("megatron_layer")
    x, bias, weights = torch.randn(5, 48), torch.randn(48), torch.rand(5)
    plain = activations.build("polynorm")
    for given in ((x, bias, None), (x, None, weights), (x, bias, weights)):
        names = {"pre_bias": given[1], "row_scale": given[2]}
        formed = plain(x, **{name: one for name, one in names.items() if one is not None})
        torch.testing.assert_close(module.separately(None, plain, *given), formed)


@pytest.fixture
def overhead() -> Any:
    return script("overhead")


def test_each_case_of_the_overhead_is_a_row_beside_what_the_paper_says(
    overhead: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "small"
    options = "--device cpu --tokens 16 --hidden 64 --width 96 --repetitions 2 --dtypes bfloat16"
    monkeypatch.setattr(sys, "argv", ["x", *options.split(), "--output", str(output)])
    assert overhead.main() == 0
    with output.with_suffix(".csv").open() as file:
        rows = {(row["mode"], row["case"]): row for row in csv.DictReader(file)}
    assert set(rows) == set(product(overhead.MODES, overhead.CASES))
    for row in rows.values():
        floor = rows[row["mode"], "none"]
        assert 0 <= int(row["parameters"]) - int(floor["parameters"]) <= 5  # equal, and the coefficients
        assert float(row["time_ratio"]) == pytest.approx(float(row["p20_ms"]) / float(floor["p20_ms"]))
        assert float(row["kept_ratio"]) * float(floor["kept_mib"]) == pytest.approx(float(row["kept_mib"]))
    page = output.with_suffix(".md").read_text()
    assert '"without significantly increasing model size or complexity"' in page
    assert "polynorm 14 (5.47%)" in page
    assert page in capsys.readouterr().out


def test_the_overhead_is_measured_with_the_device_replaced(
    overhead: Any, pretended: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10**9)
    options = "--tokens 16 --hidden 64 --width 96 --repetitions 2 --modes ffn --dtypes bfloat16"
    output = tmp_path / "gpu"
    monkeypatch.setattr(
        sys, "argv", ["x", *options.split(), "--device", str(pretended), "--output", str(output)]
    )
    assert overhead.main() == 0
    with output.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["p50_ms"] for row in rows} == {"1.0"}  # by the events
    assert {row["kept_mib"] for row in rows} == {str((10**6 - 16 * 64 * 2) / 2**20)}  # by the allocator
    assert "on NVIDIA H100 80GB HBM3" in output.with_suffix(".md").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bytes_kept_are_those_that_the_operations_need(overhead: Any, dtype: torch.dtype) -> None:
    """In tensors of the FFN's width; rows of a normalising activation have order floats more."""
    if "cpu" not in library.devices:
        pytest.skip(f"the fused operations are not there: {library.problem}")
    tokens, hidden, width = 16, 64, 96
    x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    one = tokens * width * dtype.itemsize
    scales = tokens * 3 * 4
    expected = {
        "none": one,
        "relu": one,
        "gelu": 2 * one,
        "swiglu": one * 8 // 3,  # the halves of what is twice as wide, SiLU of one of them, and the product
        "polyrelu": 2 * one,
        "polynorm": 2 * one + scales,
        "polynorm, recomputing": one + scales,
        "polynorm, authors": 2 * one,
    }
    kept = {}
    for case in expected:
        network = overhead.network(case, "ffn", x, width)
        kept[case], peak = overhead.memory(network, x, torch.randn_like(x), x.device)
        gradients = sum(parameter.numel() for parameter in network.parameters()) * dtype.itemsize
        assert peak >= max(kept[case], gradients)
    assert kept == expected


def test_the_blocks_are_one_function_whichever_way_it_is_computed(overhead: Any) -> None:
    """Else their costs cannot be compared."""
    x = torch.randn(16, 64)
    results = []
    for case in ("polynorm", "polynorm, eager", "polynorm, authors", "polynorm, recomputing"):
        for mode in ("ffn", "ffn, recomputed"):
            torch.manual_seed(0)
            results.append(overhead.network(case, mode, x, 96)(x))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
