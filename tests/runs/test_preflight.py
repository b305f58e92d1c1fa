"""What is wrong with a node, or between nodes, is a sentence that names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from polycom_ext.cli import main
from polycom_ext.machine.nvidia import Driver, Gpu, Process
from polycom_ext.runs import plan, preflight
from polycom_ext.runs.preflight import compare
from polycom_ext.runs.site import Site
from polycom_ext.runs.spec import load
from polycom_ext.runs.wishes import CHECKS, Wishes

A100 = Gpu(
    index=3,
    uuid="GPU-3",
    name="A100",
    capability="8.0",
    memory_mib=81920,
    used_mib=4,
    celsius=40,
    mhz=210,
    max_mhz=1410,
    clocks_set=False,
    mig=False,
    ecc=True,
    uncorrected=0,
    slowed=(),
    faults=(),
    processes=(),
)


def node(*gpus: Gpu, problem: str = "", driver: str = "580.65", **facts: Any) -> dict[str, Any]:
    about = asdict(Driver(driver, gpus, problem))
    common = {
        "package": {"polycom-ext": "0.1 (files 1234)"},
        "spec": {"run.yaml": "5678"},
        "trees": {"toy": "1.0, applied"},
        "versions": {"Python": "3.12.3", "torch": "2.13.0", "NCCL": "2.28.9"},
        "disk": {"path": "/runs/small", "free": 10**11, "writable": True},
        "data": {"/data/a.bin": "12 bytes (ab)"},
        "ahead": 0.01,
    }
    return {**common, "gpus": {**about, "driver": driver}, **facts}


def wrong(*nodes: dict[str, Any], processes: int | None = 1, **wishes: Any) -> list[str]:
    present = {rank: (f"gpu-{rank:02}", facts) for rank, facts in enumerate(nodes)}
    return compare(present, processes, Wishes(**wishes))


def test_nodes_that_are_alike_and_well_may_start() -> None:
    assert wrong(node(A100), node(A100), node(A100)) == []
    assert wrong(node(), node(), processes=8) == [], "rehearsed on CPUs"


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            {"package": {"polycom-ext": "0.2 (files 9)"}},
            "has polycom-ext 0.2 (files 9), but node 0 (gpu-00) has 0.1 (files 1234)",
        ),
        ({"spec": {"run.yaml": "0000"}}, "has run.yaml 0000, but node 0 (gpu-00) has 5678"),
        ({"trees": {"toy": "1.0, drifted"}}, "has toy 1.0, drifted, but node 0 (gpu-00) has 1.0, applied"),
        (
            {"versions": {"Python": "3.12.3", "torch": "2.13.0", "NCCL": "2.27.3"}},
            "has NCCL 2.27.3, but node 0 (gpu-00) has 2.28.9",
        ),
        ({"data": {}}, "has /data/a.bin none, but node 0 (gpu-00) has 12 bytes (ab)"),
        ({"driver": "570.1"}, "has the driver 570.1, but node 0 (gpu-00) has 580.65"),
        ({"ahead": -7.25}, "has a clock that is 7.2 s behind that of node 0, and preflight.clock is 5 s"),
        ({"ahead": 60.0}, "has a clock that is 60.0 s ahead of that of node 0, and preflight.clock is 5 s"),
        (
            {"disk": {"path": "/runs/small", "free": 5 * 10**8, "writable": True}},
            "has 0.5 GB free in /runs/small, and preflight.disk is 1 GB",
        ),
        (
            {"disk": {"path": "/runs/small", "free": 10**12, "writable": False}},
            "cannot write to /runs/small",
        ),
        ({"problem": "nvidia-smi: GPU is lost"}, "has a driver that fails: nvidia-smi: GPU is lost"),
    ],
)
def test_the_node_that_differs_or_is_not_well_is_named(facts: dict[str, Any], said: str) -> None:
    assert wrong(node(A100), node(A100), node(A100, **facts)) == [f"node 2 (gpu-02) {said}"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"faults": ("memory rows could not be remapped",)}, "that is not healthy: memory rows could not be"),
        ({"slowed": ("slowed down by the power supply",)}, "that is slowed down by the power supply"),
        ({"processes": (Process(77, "train", 900),)}, "that is in use by train (process 77)"),
        ({"used_mib": 40000}, "that is in use by processes that are not seen from there, with 40000 MiB"),
    ],
)
def test_a_gpu_that_is_not_well_or_not_idle_is_named(changes: dict[str, Any], said: str) -> None:
    [sentence] = wrong(node(A100), node(replace(A100, **changes)))
    assert sentence.startswith(f"node 1 (gpu-01) has a GPU 3 (A100) {said}")


def test_gpus_that_the_run_does_not_use_may_be_in_use() -> None:
    busy = replace(A100, index=4, used_mib=40000)
    assert wrong(node(A100, busy), node(A100, busy)) == []
    assert len(wrong(node(A100, busy), node(A100, busy), processes=2)) == 2
    assert len(wrong(node(A100, busy), node(A100, busy), processes=None)) == 2, "no run, and all of them"


@pytest.mark.parametrize(
    ("named", "indices"),
    [(None, [0, 1, 2]), ("", []), ("2,0", [2, 0]), ("GPU-b1", [1]), ("MIG-8f/1/0", [0, 1, 2])],
)
def test_a_node_has_the_gpus_that_are_visible(named: str | None, indices: list[int]) -> None:
    gpus = [replace(A100, index=index, uuid=f"GPU-b{index}") for index in range(3)]
    assert [gpu.index for gpu in preflight.visible_of(gpus, named)] == indices


def test_a_node_with_fewer_gpus_than_processes_is_named_and_so_is_one_without() -> None:
    few = "node 1 (gpu-01) has 1 GPU, and the run has 2 processes a node"
    fewer = "node 1 (gpu-01) has GPUs: 1 × A100, but node 0 (gpu-00) has 2 × A100"
    assert wrong(node(A100, A100), node(A100), node(A100, A100), processes=2) == [few, fewer]
    none = "node 0 (gpu-00) has GPUs: none, but node 1 (gpu-01) has 1 × A100"
    assert wrong(node(), node(A100), node(A100)) == [none], "most are right, not the first"


@pytest.mark.parametrize("check", CHECKS)
def test_each_check_can_be_switched_off(check: str) -> None:
    sick = replace(A100, faults=("lost",), used_mib=40000)
    named: dict[str, Any] = {name: {"x": "y"} for name in ("package", "spec", "trees", "versions", "data")}
    other = node(
        sick,
        sick,
        **named,
        disk={"path": "/runs", "free": 1, "writable": True},
        ahead=60.0,
    )
    everything = wrong(node(A100), other)
    left = wrong(node(A100), {key: value for key, value in other.items() if key != check}, off=(check,))
    assert len(left) < len(everything)


def test_what_keeps_a_run_from_starting_on_a_node_is_its_sentence() -> None:
    bad = {"problem": "/data/a.bin not found"}
    present = {0: ("gpu-00", node()), 1: ("gpu-01", bad)}
    assert compare(present, 1, Wishes()) == ["node 1 (gpu-01): /data/a.bin not found"]


def planned(spec: str) -> plan.Run:
    run = plan.planned(load(Path(spec)), None, Path("outputs"), Site())
    run.directory.path.mkdir(parents=True, exist_ok=True)
    run.directory.write(run.spec, run.adapter, run.command, run.site, {})
    return run


def test_a_nodes_facts_are_what_is_there(
    toy_spec: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = tmp_path / "text"
    data.with_suffix(".tokens").write_text("1 2 3\n")
    run = planned(toy_spec(steps=1))
    told = replace(run.adapter.facts(run.spec), data=(str(data),))
    monkeypatch.setattr(type(run.adapter), "facts", lambda self, spec: told)
    facts = preflight.look(run, Wishes())
    assert compare({0: ("a", facts), 1: ("b", facts)}, 1, Wishes()) == []
    [(file, about)] = facts["data"].items()
    assert (file, about[:9]) == (f"{data}.tokens", "6 bytes (")
    assert facts["disk"]["writable"]
    for change, kind in (
        (lambda: data.with_suffix(".tokens").write_text("1 2 4\n"), "data"),
        (lambda: run.directory.spec.write_text(run.directory.spec.read_text() + "\n"), "spec"),
    ):
        change()
        changed = preflight.look(run, Wishes())
        assert [key for key in facts if key in CHECKS and facts[key] != changed[key]][-1] == kind
        [sentence] = compare({0: ("a", facts), 1: ("b", changed)}, 1, Wishes())
        assert sentence.startswith("node 1 (b) has ")
        facts = changed


def test_the_torch_of_a_node_is_told_without_importing_it(toy_spec: Callable[..., str]) -> None:
    import torch

    versions = preflight.look(planned(toy_spec(steps=1)), Wishes())["versions"]
    if not torch.cuda.is_available():
        assert versions["torch"] == torch.__version__
        assert versions["torch's commit"] == torch.version.git_version


def test_an_input_that_is_not_on_this_node_is_its_problem(toy_spec: Callable[..., str]) -> None:
    facts = preflight.look(planned(toy_spec(steps=1, needs="/nowhere")), Wishes())
    assert facts["problem"] == "toy.needs: /nowhere not found"


def test_a_node_alone_is_looked_at_too_where_nobody_else_has(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    run = planned(toy_spec(steps=1, needs="/nowhere"))
    assert main(["node", str(run.directory.path)]) == 2
    assert "toy.needs: /nowhere not found" in capfd.readouterr().err
    assert run.directory.attempts() == []
