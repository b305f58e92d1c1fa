"""`polycom doctor`: what it prints, and its exit status for this package and for a run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from polycom_ext.cli import main
from polycom_ext.doctor import run
from polycom_ext.doctor.findings import Mark
from polycom_ext.machine import look as machine
from polycom_ext.machine.look import Machine, Package
from polycom_ext.runs import plan
from polycom_ext.runs.adapter import Needs, Upstream
from polycom_ext.runs.plan import Run
from polycom_ext.runs.site import Site
from polycom_ext.runs.spec import load
from polycom_ext.upstream import fetch, trees

from ..runs.conftest import register, write_spec
from ..upstream.conftest import Small, make_small
from .conftest import H100, MACHINE, NO_GPU

OK, MISSING, WRONG, UNNEEDED = Mark.OK, Mark.MISSING, Mark.WRONG, Mark.UNNEEDED


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """The one upstream that is pinned; the toy trainer is its trainer, and needs its patches."""
    register(monkeypatch, tmp_path)
    adapter: Any = import_module("toy").ToyAdapter
    monkeypatch.setattr(adapter, "upstreams", {"small": Upstream("Small", ("small",))})
    monkeypatch.setattr(adapter, "needs_patches", lambda self, spec: True)
    return make_small(tmp_path, monkeypatch)


def planned(**options: Any) -> Run:
    spec = load(Path(write_spec("a-run", 1, {"steps": 1, **options})))
    return plan.planned(spec, None, Path("outputs"), Site())


def test_a_run_that_can_start_here_for_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(monkeypatch, tmp_path)
    spec = write_spec("small", 2, {"steps": 1, "imports": ["numpy"]})
    assert main(["doctor", "--json", "--config", spec]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["ready"], told["subject"]) == (True, "small")
    facts = told["machine"]["torch"]
    assert (facts["version"], facts["cuda"], facts["problem"]) == (torch.__version__, torch.version.cuda, "")
    assert len(facts["devices"]) == torch.cuda.device_count()
    operations = told["machine"]["operations"]
    fused = "fused" if "cpu" in operations["fused_on"] else "plain"
    assert operations["checked"]["cpu"] == {
        **dict.fromkeys(("prelu", "swish", "xielu", "polyprelu"), "plain"),
        **dict.fromkeys(("polyrelu", "polynorm", "polyrelunorm"), fused),
    }
    found = {one["subject"]: one for one in told["findings"]}
    assert {"python", "torch", "clock", "devices", "packages", "spec", "inputs"} <= set(found)
    assert found["numpy"]["text"] == numpy.__version__
    assert found["devices"]["mark"] == "ok"
    assert (found["packages"]["mark"], found["packages"]["way_out"]) == ("ok", "")
    assert re.fullmatch(r"[1-9]\d* of polycom-ext\[toy\]", found["packages"]["text"])
    assert found["spec"]["text"] == f"polynorm on toy, for {tmp_path / 'outputs' / 'small'}"
    assert found["inputs"]["text"] == "files and secrets are there"
    assert "upstream megatron" in found
    assert set(found["devices"]) == {"subject", "mark", "text", "way_out", "stops"}
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


def test_a_torch_that_crashes_is_a_line_and_the_others_are_told(
    installed: Callable[..., Path], tmp_path: Path, small: Small
) -> None:
    """The process that crashes is not doctor's own."""
    installed({"torch/__init__.py": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"})
    command = [sys.executable, "-m", "polycom_ext.cli", "doctor"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (2, "")
    lines = finished.stdout.splitlines()
    assert any(line.startswith("wrong") and "its import crashes (SIGSEGV)" in line for line in lines)
    assert any(line.startswith("ok") and " python " in line for line in lines)
    assert lines[-1] == "polycom-ext does not work here, because of: torch, polycom-ext"


def test_what_is_installed_has_a_line_each(
    installed: Callable[..., Path],
    smi: Callable[..., None],
    small: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Found by real imports of packages that are empty, beside a driver that is a script."""
    smi({"gpu": [H100]})
    installed({"torch/__init__.py": "from types import SimpleNamespace as S\nversion = S(cuda=None)\n"})
    for name, (files, version) in {
        "transformer-engine": (["transformer_engine/__init__.py", "transformer_engine/pytorch.py"], "2.20.2"),
        "apex": (["apex/__init__.py", "apex/multi_tensor_apply/__init__.py"], "0.1"),
        "flash-attn": (["flash_attn/__init__.py"], "2.8.3"),
        "grouped_gemm": (["grouped_gemm/__init__.py"], "1.1.4"),
    }.items():
        installed(dict.fromkeys(files, ""), name, version)
    monkeypatch.setenv("POLYCOM_CACHE", str(tmp_path / "cache"))
    assert main(["doctor", "--json"]) == 2, "torch is empty too"
    told = json.loads(capsys.readouterr().out)
    found = {one["subject"]: (one["mark"], one["text"]) for one in told["findings"]}
    assert found["driver"] == ("ok", "580.95.05, 1 GPU")
    assert found["GPU 0"][1].startswith("NVIDIA H100 80GB HBM3, compute capability 9.0")
    for subject, text in {
        "transformer-engine": "2.20.2",
        "apex (NVIDIA's)": "0.1",
        "flash-attn": "2.8.3",
        "grouped_gemm": "1.1.4",
    }.items():
        assert found[subject][0] == "ok"
        assert found[subject][1].startswith(text)
    assert found["torch"][0] == "wrong"
    places = {one["purpose"]: one["path"] for one in told["machine"]["folders"]}
    shared = {"shared memory": "/dev/shm"} if os.path.isdir("/dev/shm") else {}
    assert places == {
        "runs": str(Path("outputs").absolute()),
        "cache": str(tmp_path / "cache"),
        "temporary files": tempfile.gettempdir(),
        **shared,
    }


TE = "transformer_engine.pytorch"
RUNS: dict[str, tuple[Machine, list[str], int, str]] = {
    "on a GPU": (MACHINE, [], 0, "a-run can start here"),
    "rehearsed": (NO_GPU, [], 0, "a-run can start here"),
    "more processes than GPUs": (
        *(MACHINE, ["processes_per_node=2"], 2),
        "a-run cannot start here, because of: devices",
    ),
    "on GPUs only": (
        *(NO_GPU, ["toy.only-on-gpus=it says so"], 2),
        "a-run cannot start here, because of: devices",
    ),
    "a package that is there": (MACHINE, [f"toy.imports=[{TE}]"], 0, "a-run can start here"),
    "a package that is not": (
        *(NO_GPU, [f"toy.imports=[{TE}]"], 2),
        "a-run cannot start here, because of: transformer-engine",
    ),
    "data that is not there": (
        *(MACHINE, ["toy.needs=nowhere.bin"], 2),
        "a-run cannot start here, because of: inputs",
    ),
    "options that are refused": (
        *(MACHINE, ["toy.steps=null"], 2),
        "a-run cannot start here, because of: spec",
    ),
    "no run at all": (
        *(MACHINE, ["activation=polynom"], 2),
        "a-run.yaml cannot start here, because of: spec",
    ),
}


@pytest.mark.parametrize(("looked", "changes", "status", "verdict"), RUNS.values(), ids=RUNS)
def test_the_exit_status_says_whether_a_run_can_start(
    looked: Machine,
    changes: list[str],
    status: int,
    verdict: str,
    small: Small,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On machines that are given as their facts: no GPU can be had here."""
    monkeypatch.setattr(import_module("toy").ToyAdapter, "upstreams", {})
    monkeypatch.setattr(machine, "look", lambda *_: looked)
    spec = write_spec("a-run", 1, {"steps": 1})
    sets = [word for change in changes for word in ("--set", change)]
    assert main(["doctor", "--config", spec, *sets]) == status
    assert capsys.readouterr().out.splitlines()[-1] == verdict


def test_what_is_looked_at_is_of_the_run(
    small: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its directory, its modules, those of a GPU only where there is one, and its nodes."""
    asked: list[tuple[Any, ...]] = []
    clock = replace(MACHINE.clock, synchronised=False)
    packages = (*MACHINE.packages, Package("one", "/1", "1", imported=True), Package("two"))

    def look(base: Machine) -> Callable[..., Machine]:
        return lambda *of: asked.append(of) or replace(base, clock=clock, packages=packages)  # type: ignore[func-returns-value]

    needs = Needs(modules={"one": "a run"}, on_gpu={"two": "its GPU"})
    monkeypatch.setattr(import_module("toy").ToyAdapter, "needs", lambda self, spec: needs)
    monkeypatch.setattr(import_module("toy").ToyAdapter, "upstreams", {})
    spec = write_spec("a-run", 1, {"steps": 1})
    command = ["doctor", "--config", spec, "--set", "nodes=2", "--output", "elsewhere"]
    monkeypatch.setattr(machine, "look", look(MACHINE))
    assert main(command) == 2
    told = capsys.readouterr().out
    assert "two                     not installed; its GPU" in told
    assert "and nothing keeps it synchronised" in told
    assert told.splitlines()[-1] == "a-run cannot start here, because of: two"
    monkeypatch.setattr(machine, "look", look(NO_GPU))
    assert main(command) == 0
    [*_, (folder, modules)] = asked
    assert folder.resolve() == Path("elsewhere").resolve()
    assert modules == ["one", "two"]


def test_without_a_run_the_package_is_asked_about(
    small: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(machine, "look", lambda runs: asked.append(runs) or MACHINE)  # type: ignore[func-returns-value]
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "polycom-ext works here"
    assert any("upstream small" in line for line in lines)
    assert asked == [Path("outputs")]


def test_a_run_that_cannot_start_here_for_a_program(
    small: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "look", lambda *_: MACHINE)
    spec = write_spec("a-run", 1, {"steps": 1})
    assert main(["doctor", "--json", "--config", spec, "--set", "activation=polynom"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["ready"], told["subject"]) == (False, spec)
    assert told["machine"]["nvcc"] == {"path": "/usr/local/cuda/bin/nvcc", "release": "13.0", "problem": ""}
    [stops] = [one for one in told["findings"] if one["stops"]]
    assert (stops["subject"], stops["mark"]) == ("spec", "wrong")


def test_what_is_of_a_run_needs_one(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--set", "nodes=2"], ["--output", "x"]):
        assert main(["doctor", *option]) == 2
        assert "name its spec with --config" in capsys.readouterr().err


def bring(small: Small, state: str) -> None:
    """The tree of the small upstream into this state."""
    if state == "absent":
        return
    fetch.fetch(small.pin)
    if state != "pristine":
        trees.apply(small.pin)
    if state == "partly applied":
        path = small.tree / "small" / "mlp.py"
        path.write_text(path.read_text().replace("line three", "line 3"))
    if state == "drifted":
        (small.tree / "small" / "mlp.py").write_text("mine\n")


@pytest.mark.parametrize(
    ("state", "alone", "on_patches", "without_patches"),
    [
        ("absent", (UNNEEDED, False), (MISSING, True), (MISSING, True)),
        ("pristine", (MISSING, False), (MISSING, True), (OK, False)),
        ("applied", (OK, False), (OK, False), (OK, False)),
        ("partly applied", (WRONG, False), (WRONG, True), (WRONG, False)),
        ("drifted", (WRONG, False), (WRONG, True), (WRONG, False)),
    ],
)
def test_the_state_of_an_upstream_and_which_runs_it_stops(
    state: str,
    alone: tuple[Mark, bool],
    on_patches: tuple[Mark, bool],
    without_patches: tuple[Mark, bool],
    small: Small,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bring(small, state)
    for needs_patches, wanted in ((None, alone), (True, on_patches), (False, without_patches)):
        adapter = import_module("toy").ToyAdapter
        monkeypatch.setattr(adapter, "needs_patches", lambda self, spec, needs=needs_patches: needs)
        [found] = run.upstreams(None if needs_patches is None else planned())
        assert found.text.startswith(f"1.0: {state}")
        assert (", 2 patches" in found.text) == (found.mark is OK and state == "applied")
        assert (found.mark, found.stops) == wanted
        verb = {OK: "", WRONG: "polycom upstream status small"}
        assert found.way_out == verb.get(found.mark, "polycom upstream apply small")


def test_an_upstream_of_no_tree_of_the_run_is_not_needed(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("toy").ToyAdapter, "upstreams", {})
    fetch.fetch(small.pin)
    [found] = run.upstreams(planned())
    assert (found.mark, found.stops) == (UNNEEDED, False)


def test_a_series_that_is_broken_is_told(small: Small) -> None:
    (small.series / "series").unlink()
    [found] = run.upstreams(planned())
    assert (found.mark, found.stops) == (WRONG, True)
    assert "series" in found.text


REQUIRES = ("numpy", "PyYAML>=5", "tomli; python_version < '3.0'", "nothing-like-it; extra == 'other'")


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ((), None),
        (("absent-one; extra == 'toy'",), "absent-one is not installed"),
        (("PyYAML>=99; extra == 'toy'",), " is not >=99"),
        (("PyYAML>=99; extra == 'other'",), None),
        (("early>=0.9; python_version < '2'",), None),
        (("alpha>2.11.0a0; extra == 'toy'",), "alpha 2.11.0a0 is not >2.11.0a0"),
        (
            ("no-one; extra == 'toy'", "no-two; extra == 'toy'"),
            "no-one is not installed; no-two is not installed",
        ),
        (("alpha>=2.10; extra == 'toy'",), None),  # which is how NVIDIA's containers number their torch
    ],
)
def test_the_packages_of_the_trainers_extra_and_their_versions(
    more: tuple[str, ...], problem: str | None, small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alpha = tmp_path / "alpha-2.11.0a0.dist-info"
    alpha.mkdir()
    (alpha / "METADATA").write_text("Metadata-Version: 2.1\nName: alpha\nVersion: 2.11.0a0\n")
    about = tmp_path / "polycom_ext-0.1.0.dist-info"
    about.mkdir()
    lines = [f"Requires-Dist: {text}\n" for text in (*REQUIRES, *more)]
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: polycom-ext\nVersion: 0.1.0\n{''.join(lines)}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = run.requirements(planned())
    if problem is None:
        asked = 2 + any("alpha" in text for text in more)
        assert (found.mark, found.text) == (OK, f"{asked} of polycom-ext[toy]")
    else:
        assert (found.mark, found.stops) == (WRONG, True)
        assert problem in found.text
        assert found.way_out == "pip install 'polycom-ext[toy]'"


def test_without_packaging_versions_are_not_compared(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    found = run.requirements(planned())
    assert (found.mark, found.stops, found.way_out) == (MISSING, False, "pip install packaging")
    assert found.text.startswith("not compared with polycom-ext[toy]: import of packaging.requirements")


def test_in_a_copy_that_is_not_installed_versions_are_not_compared(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a PYTHONPATH."""
    monkeypatch.setattr(run, "DISTRIBUTION", "polycom-nowhere")
    found = run.requirements(planned())
    assert (found.mark, found.stops) == (MISSING, False)
    assert "polycom-nowhere" in found.text


def test_the_directory_of_a_run_must_be_one_that_it_can_go_on_in(small: Small) -> None:
    (Path("outputs")).mkdir()
    (Path("outputs") / "a-run").touch()
    [spec, inputs] = run.checks(planned())
    assert (spec.mark, spec.stops, inputs.mark) == (WRONG, True, OK)
    assert "is a file, not a folder" in spec.text


def test_secrets_are_inputs(small: Small) -> None:
    found = planned()
    os.environ.pop("TOY_TOKEN", None)
    found.spec.environment["TOY_TOKEN"] = "${TOY_TOKEN}"
    [_, inputs] = run.checks(found)
    assert (inputs.mark, inputs.stops) == (WRONG, True)
    assert "TOY_TOKEN" in inputs.text
