"""Every line that doctor can say of a machine, as the fact that it is about changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from polycom_ext.doctor.findings import Finding, Mark, shown
from polycom_ext.doctor.judgement import Wants, judge
from polycom_ext.machine.look import Clock, Compiler, Folder, Machine, Package, Torch
from polycom_ext.machine.nvidia import Driver, Process

from .conftest import GPU, MACHINE, NO_GPU

OK, MISSING, WRONG, UNNEEDED = Mark.OK, Mark.MISSING, Mark.WRONG, Mark.UNNEEDED
RUN = Wants(processes=1, nodes=1, gpu="", modules={})
TE = "transformer_engine.pytorch"


def of(machine: Machine, subject: str, wants: Wants | None = None) -> Finding:
    [found] = [one for one in judge(machine, wants) if one.subject == subject]
    return found


def with_(part: str, **changes: Any) -> Machine:
    return replace(MACHINE, **{part: replace(getattr(MACHINE, part), **changes)})


def with_gpu(**changes: Any) -> Machine:
    return with_("driver", gpus=(replace(GPU, **changes),))


def with_packages(*packages: Package) -> Machine:
    named = {one.module for one in packages}
    return replace(
        MACHINE, packages=(*packages, *(one for one in MACHINE.packages if one.module not in named))
    )


@pytest.mark.parametrize("wants", [None, RUN])
@pytest.mark.parametrize("machine", [MACHINE, NO_GPU], ids=["gpu", "laptop"])
def test_where_nothing_is_wrong_nothing_is_said_to_be(machine: Machine, wants: Wants | None) -> None:
    findings = judge(machine, wants)
    assert {one.mark for one in findings} <= {OK, UNNEEDED}
    assert not any(one.stops or one.way_out for one in findings)
    assert len({one.subject for one in findings if one.subject != "polycom-ext"}) == len(findings) - sum(
        one.subject == "polycom-ext" for one in findings
    )


CASES: dict[str, tuple[Machine, str, Mark, bool, str]] = {
    "no torch": (
        replace(MACHINE, torch=Torch(problem="ModuleNotFoundError: No module named 'torch'")),
        *("torch", MISSING, True, "not installed"),
    ),
    "torch crashes": (
        replace(MACHINE, torch=Torch(problem="its import crashes (SIGSEGV)")),
        *("torch", WRONG, True, "SIGSEGV"),
    ),
    "nothing works without torch": (
        replace(MACHINE, torch=Torch(problem="x")),
        *("polycom-ext", WRONG, True, "works only with torch"),
    ),
    "a CPU build beside a GPU": (
        replace(MACHINE, torch=NO_GPU.torch),
        *("torch", WRONG, False, "a build without CUDA beside a GPU"),
    ),
    "an old driver": (
        with_("torch", devices=(), cuda_problem="The NVIDIA driver on your system is too old"),
        *("torch", WRONG, False, "cannot use the GPUs: The NVIDIA driver"),
    ),
    "operations that crash": (
        with_("operations", problem="its import crashes (SIGILL)"),
        *("polycom-ext", WRONG, True, "SIGILL"),
    ),
    "an activation is off": (
        with_("operations", checked={"cpu": {"polynorm": "y is off by 1.0e-01", "polyrelu": "fused"}}),
        *("polycom-ext", WRONG, True, "on cpu: polynorm: y is off by 1.0e-01"),
    ),
    "no CPU operations": (
        with_("operations", fused_on=(), fused_problem="no compiled operations are installed"),
        *("operations, CPU", MISSING, False, "more slowly: no compiled operations are installed"),
    ),
    "eager": (
        with_("operations", fused_on=(), fused_problem=""),
        *("operations, CPU", MISSING, False, "POLYCOM_OPS=eager"),
    ),
    "no CUDA operations": (
        with_("operations", fused_on=("cpu",), fused_problem="not compiled (nvcc failed: out of memory)"),
        *("operations, GPU", MISSING, False, "nvcc failed: out of memory"),
    ),
    "no code for this GPU": (
        with_("operations", gpu_problems=("_cuda.so holds no code for compute capability 12.0",)),
        *(
            "operations, GPU",
            MISSING,
            False,
            "code for sm_90, compute_90; on cuda:0 they do not run: _cuda.so",
        ),
    ),
    "CUDA operations and no device": (
        with_("operations", gpu_problems=()),
        *("operations, GPU", WRONG, False, "torch has no GPU"),
    ),
    "a driver that fails": (
        replace(MACHINE, driver=Driver(None, problem="nvidia-smi: NVIDIA-SMI has failed")),
        *("driver", WRONG, False, "NVIDIA-SMI has failed"),
    ),
    "slow GPU": (
        with_gpu(slowed=("slowed down by the hardware",)),
        *("GPU 0", WRONG, False, "slowed down by the hardware"),
    ),
    "no NCCL": (with_("torch", nccl=None), "NCCL", MISSING, False, "this torch has none"),
    "no nvcc, nothing built": (
        replace(with_("operations", fused_on=("cpu",)), nvcc=Compiler(None)),
        *("nvcc", MISSING, False, "not found"),
    ),
    "another nvcc": (
        replace(with_("operations", fused_on=("cpu",)), nvcc=Compiler("/nvcc", "12.4", "of CUDA 12.4 but")),
        *("nvcc", WRONG, False, "of CUDA 12.4 but"),
    ),
    "no Transformer Engine": (
        with_packages(Package(TE)),
        *("transformer-engine", MISSING, False, "not installed"),
    ),
    "a broken Transformer Engine": (
        with_packages(Package(TE, "/site", "2.20.2", problem="its import crashes (SIGSEGV)")),
        *("transformer-engine", WRONG, False, "2.20.2 cannot be imported: its import crashes (SIGSEGV)"),
    ),
    "PyPI's apex": (
        with_packages(Package("apex", "/site/apex", "0.9.10.dev0", foreign="Pyramid toolkit")),
        *("apex (NVIDIA's)", WRONG, False, "/site/apex is another project of that name (Pyramid toolkit)"),
    ),
    "a full disk": (
        replace(MACHINE, folders=(Folder("cache", "/c", 5 << 20, True),)),
        *("disk, cache", WRONG, False, "0.0 GiB free in /c"),
    ),
    "a folder of others": (
        replace(MACHINE, folders=(Folder("temporary files", "/c", 1 << 40, False),)),
        *("disk, temporary files", WRONG, False, "/c cannot be written to"),
    ),
    "a container's shared memory": (
        replace(MACHINE, folders=(Folder("shared memory", "/dev/shm", 64 << 20, True),)),
        *("shared memory", WRONG, False, "0.1 GiB free in /dev/shm"),
    ),
    "a clock in the past": (
        replace(MACHINE, clock=Clock(0.0, 1.79e9, True)),
        *("clock", WRONG, False, "1970-01-01 00:00 UTC, but a file of this package is of 2026-"),
    ),
}


@pytest.mark.parametrize(("machine", "subject", "mark", "stops", "text"), CASES.values(), ids=CASES)
def test_what_is_wrong_without_a_run(
    machine: Machine, subject: str, mark: Mark, stops: bool, text: str
) -> None:
    found = of(machine, subject)
    assert (found.mark, found.stops) == (mark, stops)
    assert text in found.text


@pytest.mark.parametrize(
    ("machine", "subject", "way_out"),
    [
        (CASES["no torch"][0], "torch", "install torch: https://pytorch.org"),
        (CASES["torch crashes"][0], "torch", "reinstall torch"),
        (CASES["no code for this GPU"][0], "operations, GPU", "TORCH_CUDA_ARCH_LIST=9.0 pip install ."),
        (CASES["no Transformer Engine"][0], "transformer-engine", "if a run of yours asks for it"),
        (CASES["a broken Transformer Engine"][0], "transformer-engine", "reinstall transformer-engine"),
        (
            CASES["PyPI's apex"][0],
            "apex (NVIDIA's)",
            "pip uninstall apex; NVIDIA's comes from https://github",
        ),
        (CASES["a container's shared memory"][0], "shared memory", "--ipc=host"),
        (CASES["a full disk"][0], "disk, cache", "make room"),
        (with_gpu(faults=("x",)), "GPU 0", "nvidia-smi --gpu-reset -i 0"),
    ],
)
def test_the_way_out(machine: Machine, subject: str, way_out: str) -> None:
    assert way_out in of(machine, subject).way_out


def test_a_gpu_is_described() -> None:
    healthy = "NVIDIA H100 80GB HBM3, compute capability 9.0, 80 GiB, 34 °C, 345 of 1980 MHz, ECC on"
    assert of(MACHINE, "GPU 0").text == healthy
    assert of(with_gpu(mig=True, clocks_set=True, ecc=False), "GPU 0").text.endswith(
        "345 of 1980 MHz, held by a setting, ECC off, divided by MIG"
    )
    assert of(with_gpu(capability=None, memory_mib=None, celsius=None, mhz=None, ecc=None), "GPU 0").text == (
        "NVIDIA H100 80GB HBM3"
    )


UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"faults": ("2 memory errors that ECC could not correct",)}, "2 memory errors"),
    ({"processes": (Process(77, "python", 9000),)}, "in use by python (process 77)"),
    ({"used_mib": 40000}, "in use by processes that are not seen from here, with 39 GiB"),
]


@pytest.mark.parametrize(("changes", "text"), UNFIT)
def test_a_gpu_that_is_ill_or_in_use_stops_a_run_that_would_be_on_it_and_no_other(
    changes: dict[str, Any], text: str
) -> None:
    machine = with_gpu(**changes)
    for wants, stops in ((None, False), (RUN, True)):
        found = of(machine, "GPU 0", wants)
        assert (found.mark, found.stops) == (WRONG, stops)
        assert text in found.text
    hidden = replace(
        machine, torch=replace(MACHINE.torch, devices=(replace(MACHINE.torch.devices[0], uuid="GPU-b"),))
    )
    assert not of(hidden, "GPU 0", RUN).stops


def test_a_low_clock_stops_no_run() -> None:
    assert not of(CASES["slow GPU"][0], "GPU 0", RUN).stops


def test_a_run_needs_a_gpu_for_each_process() -> None:
    assert of(MACHINE, "devices", RUN).mark is OK
    found = of(replace(MACHINE, visible_devices="3"), "devices", replace(RUN, processes=8))
    assert (found.mark, found.stops) == (MISSING, True)
    assert found.text == "8 processes a node, and torch has 1 GPU (CUDA_VISIBLE_DEVICES=3)"


def test_without_gpus_a_run_is_rehearsed_unless_it_cannot_be() -> None:
    assert "rehearsed on the CPU" in of(NO_GPU, "devices", replace(RUN, processes=8)).text
    found = of(NO_GPU, "devices", replace(RUN, gpu="its backend is nccl"))
    assert (found.mark, found.stops) == (MISSING, True)
    assert found.text == "torch has no GPU, and its backend is nccl"


def test_nccl_stops_runs_of_several_processes() -> None:
    machine = CASES["no NCCL"][0]
    assert not of(machine, "NCCL", RUN).stops
    assert of(machine, "NCCL", replace(RUN, nodes=2)).stops


@pytest.mark.parametrize("base", [MACHINE, NO_GPU], ids=["gpu", "laptop"])
@pytest.mark.parametrize(
    ("package", "mark", "text"),
    [
        (Package(TE), MISSING, "not installed; it says so"),
        (
            Package(TE, "/te", "2.20.2", problem="OSError: x"),
            WRONG,
            "cannot be imported: OSError: x; it says so",
        ),
        (
            Package(TE, "/te", foreign="a toy"),
            WRONG,
            "/te is another project of that name (a toy); it says so",
        ),
    ],
)
def test_a_package_that_a_run_needs_stops_it_with_the_reason(
    base: Machine, package: Package, mark: Mark, text: str
) -> None:
    found = of(
        replace(base, packages=(package,)), "transformer-engine", replace(RUN, modules={TE: "it says so"})
    )
    assert (found.mark, found.stops) == (mark, True)
    assert text in found.text


def test_a_broken_package_is_to_be_mended_whoever_asks_for_it() -> None:
    found = of(CASES["a broken Transformer Engine"][0], "transformer-engine")
    assert found.way_out == "reinstall transformer-engine for this torch"


def test_what_a_run_does_not_need_is_said_to_be_so() -> None:
    for package in (Package(TE), Package(TE, "/te", "2.20.2", problem="OSError: x")):
        found = of(with_packages(package), "transformer-engine", RUN)
        assert (found.mark, found.stops, found.way_out) == (UNNEEDED, False, "")


def test_the_driver_is_told() -> None:
    assert (of(MACHINE, "driver").mark, of(MACHINE, "driver").text) == (OK, "580.95.05, 1 GPU")
    assert (of(NO_GPU, "driver").mark, of(NO_GPU, "driver").text) == (UNNEEDED, "no NVIDIA driver, no GPU")


def test_the_extension_api_is_told() -> None:
    assert of(MACHINE, "transformer-engine").text == "2.20.2; extension API: none, which 2.13 began"
    found = Package(TE, "/te", "2.20.2", ("register_forward_fusion",), imported=True)
    assert of(with_packages(found), "transformer-engine").text.endswith("API: register_forward_fusion")


def test_a_disk_stops_the_run_that_would_write_there() -> None:
    for folder in (Folder("runs", "/r", 1, True), Folder("runs", "/r", 1 << 40, False)):
        machine = replace(MACHINE, folders=(folder,))
        assert (of(machine, "disk, runs").stops, of(machine, "disk, runs", RUN).stops) == (False, True)


def test_nodes_must_agree_on_the_time() -> None:
    machine = replace(MACHINE, clock=Clock(1.8e9, 0.0, synchronised=False))
    assert of(machine, "clock", RUN).mark is OK
    found = of(machine, "clock", replace(RUN, nodes=2))
    assert (found.mark, found.stops, found.way_out) == (WRONG, False, "start chrony or ntpd")
    untold = replace(MACHINE, clock=Clock(1.8e9, 0.0, synchronised=None))
    found = of(untold, "clock", replace(RUN, nodes=2))
    assert found.mark is OK
    assert "is not told here" in found.text


def test_a_line_a_thing_and_the_way_out_below_it() -> None:
    lines = shown([Finding("a", OK, "b\x1b[2J"), Finding("c", WRONG, "d", "e")]).splitlines()
    assert [line.split() for line in lines] == [["ok", "a", "b\\x1b[2J"], ["wrong", "c", "d"], ["->", "e"]]
