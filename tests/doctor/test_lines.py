"""What doctor says of a machine, to the letter: the line, and the way out below it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polycom_ext.doctor.findings import Mark
from polycom_ext.doctor.judgement import Wants
from polycom_ext.machine.look import Clock, Folder, Machine, Operations, Package, Torch
from polycom_ext.machine.nvidia import Driver, Process

from .conftest import CHECKED, GPU, MACHINE, NO_GPU
from .test_judgement import RUN, TE, of, with_, with_gpu, with_packages

OK, MISSING, WRONG, UNNEEDED = Mark.OK, Mark.MISSING, Mark.WRONG, Mark.UNNEEDED
REBUILD = "pip install . --no-build-isolation"
H100 = "NVIDIA H100 80GB HBM3, compute capability 9.0, 80 GiB, 34 °C, 345 of 1980 MHz, ECC on"
DEVICE = MACHINE.torch.devices[0]
TWO = with_("torch", devices=(DEVICE, replace(DEVICE, uuid="GPU-b", capability="8.0")))
"""Two GPUs, of which torch counts the second one as older."""
STUCK = with_("torch", devices=(), cuda_problem="The driver is too old")

LINES: dict[str, tuple[Machine, Wants | None, str, Mark, str, str]] = {
    "python": (
        *(MACHINE, None, "python", OK),
        *("3.11.7, /venv/bin/python on Linux 6.8, x86_64", ""),
    ),
    "torch": (MACHINE, None, "torch", OK, "2.14.1, CUDA 13.0", ""),
    "torch on a laptop": (NO_GPU, None, "torch", OK, "2.13.0+cpu, a build without CUDA", ""),
    "no torch": (
        *(replace(MACHINE, torch=Torch(problem="ModuleNotFoundError: No module named 'torch'")), None),
        *("torch", MISSING, "not installed", "install torch: https://pytorch.org/get-started"),
    ),
    "a broken torch": (
        *(replace(MACHINE, torch=Torch(problem="OSError: x")), None),
        *("torch", WRONG, "OSError: x", "reinstall torch: https://pytorch.org/get-started"),
    ),
    "a CPU build beside a GPU": (
        *(replace(MACHINE, torch=NO_GPU.torch), None, "torch", WRONG),
        *("2.13.0+cpu, a build without CUDA beside a GPU", "install a CUDA build of torch"),
    ),
    "an old driver": (
        *(STUCK, None, "torch", WRONG, "2.14.1, CUDA 13.0, cannot use the GPUs: The driver is too old"),
        "a driver for this CUDA, or a torch for this driver",
    ),
    "a CUDA build on a laptop": (
        *(replace(STUCK, driver=NO_GPU.driver), None, "torch", OK, "2.14.1, CUDA 13.0", ""),
    ),
    "no formula without torch": (
        *(replace(MACHINE, torch=Torch(problem="x")), None, "polycom-ext", WRONG),
        *("0.1.0, /site/polycom_ext: works only with torch", "see torch"),
    ),
    "formulas": (
        *(NO_GPU, None, "polycom-ext", OK),
        *("0.1.0, /site/polycom_ext; 2 activations are as defined, forward and backward, on cpu", ""),
    ),
    "operations that crash": (
        *(with_("operations", problem="SIGILL"), None, "polycom-ext", WRONG),
        "0.1.0, /site/polycom_ext: SIGILL",
        f"{REBUILD}, or POLYCOM_OPS=eager to do without the fused operations",
    ),
    "formulas that are off": (
        *(with_("operations", checked={"cpu": {"b": "y is off", "a": "fused", "c": "z is off"}}), None),
        *("polycom-ext", WRONG, "on cpu: b: y is off; c: z is off"),
        f"{REBUILD}; if that does not help, POLYCOM_OPS=eager, and tell us",
    ),
    "CPU operations": (NO_GPU, None, "operations, CPU", OK, "fused: polynorm (avx2)", ""),
    "CPU operations of nothing": (
        *(with_("operations", checked={"cpu": {"prelu": "plain"}}), None, "operations, CPU", OK),
        *("fused: none (avx512)", ""),
    ),
    "operations that nobody could ask": (
        *(replace(NO_GPU, operations=Operations(problem="SIGILL")), None, "operations, CPU", MISSING),
        *("plain operations serve, more slowly: SIGILL", ""),
    ),
    "GPU operations": (
        *(with_("operations", checked={"cpu": CHECKED, "cuda:0": {"polyrelu": "fused"}}), None),
        *("operations, GPU", OK, "fused: polyrelu; code for sm_90, compute_90", ""),
    ),
    "GPU operations for nobody knows what": (
        *(with_("operations", architectures=()), None, "operations, GPU", OK),
        *("fused: polynorm; code for unknown architectures", ""),
    ),
    "no code for the second GPU": (
        *(replace(TWO, operations=replace(MACHINE.operations, gpu_problems=("", "no code for 8.0"))), None),
        *("operations, GPU", MISSING),
        "code for sm_90, compute_90; on cuda:1 they do not run: no code for 8.0",
        f"TORCH_CUDA_ARCH_LIST=8.0 {REBUILD}",
    ),
    "GPU operations and no device": (
        *(with_("operations", gpu_problems=()), None, "operations, GPU", WRONG),
        *("code for sm_90, compute_90, and torch has no GPU", "see torch"),
    ),
    "GPU operations on a laptop": (NO_GPU, None, "operations, GPU", UNNEEDED, "no GPU", ""),
    "a driver that fails, and nothing else of a GPU": (
        *(replace(NO_GPU, driver=Driver(None, problem="it failed")), None, "operations, GPU", MISSING),
        *("plain operations serve, more slowly: no nvcc", ""),
    ),
    "GPUs that only torch sees": (
        *(replace(MACHINE, driver=Driver(None)), None, "operations, GPU", OK),
        *("fused: polynorm; code for sm_90, compute_90", ""),
    ),
    "two GPUs": (
        *(with_("driver", gpus=(GPU, replace(GPU, index=1))), None, "driver", OK, "580.95.05, 2 GPUs", ""),
    ),
    "a driver that fails": (
        *(replace(MACHINE, driver=Driver(None, problem="it failed")), None, "driver", WRONG, "it failed"),
        "in a container, give it the driver's programs (NVIDIA_DRIVER_CAPABILITIES=compute,utility); "
        "else `dmesg` says more, and a reboot or another driver helps",
    ),
    "faults": (
        *(with_gpu(faults=("a", "b")), None, "GPU 0", WRONG, f"{H100}: a; b"),
        "nvidia-smi --gpu-reset -i 0, or a reboot; if it comes back, have it replaced",
    ),
    "somebody else": (
        *(with_gpu(processes=(Process(7, "x", 9), Process(8, "y", None))), None, "GPU 0", WRONG),
        f"{H100}: in use by x (process 7), y (process 8)",
        "end them, or name other GPUs in CUDA_VISIBLE_DEVICES",
    ),
    "memory used, of nobody knows how much": (
        *(with_gpu(memory_mib=None, used_mib=9000), None, "GPU 0", OK, H100.replace("80 GiB, ", ""), ""),
    ),
    "memory that nobody tells of": (with_gpu(used_mib=None), None, "GPU 0", OK, H100, ""),
    "slow": (
        *(with_gpu(slowed=("hot", "weak")), None, "GPU 0", WRONG, f"{H100}: hot, weak"),
        "look after cooling and power: nvidia-smi -q -d PERFORMANCE",
    ),
    "a device": (MACHINE, RUN, "devices", OK, "1 process a node, 1 GPU", ""),
    "devices": (TWO, replace(RUN, processes=2), "devices", OK, "2 processes a node, 2 GPUs", ""),
    "too few devices": (
        *(TWO, replace(RUN, processes=3), "devices", MISSING),
        "3 processes a node, and torch has 2 GPUs",
        "--set processes_per_node=2, or a machine with 3",
    ),
    "no devices": (
        *(NO_GPU, replace(RUN, gpu="it says so"), "devices", MISSING, "torch has no GPU, and it says so"),
        "a machine with GPUs and a CUDA build of torch",
    ),
    "devices that are hidden": (
        *(replace(NO_GPU, visible_devices=""), RUN, "devices", OK),
        *("1 process a node, rehearsed on the CPU: torch has no GPU (CUDA_VISIBLE_DEVICES=)", ""),
    ),
    "a package of nobody's list": (
        *(with_packages(Package("mamba_ssm", "/m", None, problem="ImportError: x")),),
        *(replace(RUN, modules={"mamba_ssm": "it says so"}), "mamba_ssm", WRONG),
        "mamba_ssm cannot be imported: ImportError: x; it says so",
        "reinstall mamba_ssm for this torch",
    ),
    "a package without a version": (
        *(with_packages(Package("apex", "/site/apex", imported=True)), None, "apex (NVIDIA's)", OK),
        *("/site/apex", ""),
    ),
    "a package that some run could ask for": (
        *(with_packages(Package(TE)), None, "transformer-engine", MISSING, "not installed"),
        "install transformer-engine for this torch, if a run of yours asks for it",
    ),
    "a package that is foreign on a laptop": (
        *(replace(NO_GPU, packages=(Package("apex", "/a", foreign="Pyramid"),)), None),
        *("apex (NVIDIA's)", WRONG, "/a is another project of that name (Pyramid)"),
        "pip uninstall apex; NVIDIA's comes from https://github.com/NVIDIA/apex",
    ),
    "a folder": (MACHINE, RUN, "disk, runs", OK, "1024.0 GiB free in /data/outputs", ""),
    "a folder of others": (
        *(replace(MACHINE, folders=(Folder("cache", "/c", 1 << 40, False),)), None, "disk, cache", WRONG),
        *("/c cannot be written to", "name another place"),
    ),
    "no cache": (
        *(replace(MACHINE, folders=(Folder("cache", "", 0, False, "is theirs; set POLYCOM_CACHE"),)), None),
        *("disk, cache", WRONG, "is theirs; set POLYCOM_CACHE", ""),
    ),
    "shared memory": (
        *(replace(MACHINE, folders=(Folder("shared memory", "/dev/shm", 1 << 26, True),)), None),
        *("shared memory", WRONG, "0.1 GiB free in /dev/shm"),
        "give the container more: docker run --ipc=host, or --shm-size",
    ),
    "clock": (MACHINE, None, "clock", OK, "2027-01-15 08:00 UTC, synchronised", ""),
    "a minute is not the past": (
        *(replace(MACHINE, clock=Clock(1.8e9, 1.8e9 + 59, True)), None, "clock", OK),
        *("2027-01-15 08:00 UTC, synchronised", ""),
    ),
    "two minutes are": (
        *(replace(MACHINE, clock=Clock(1.8e9, 1.8e9 + 120, True)), None, "clock", WRONG),
        "2027-01-15 08:00 UTC, but a file of this package is of 2027-01-15 08:02",
        "set it: certificates and records need the right time",
    ),
    "a clock of its own": (
        *(replace(MACHINE, clock=Clock(1.8e9, 0.0, False)), None, "clock", OK),
        *("2027-01-15 08:00 UTC; nothing keeps it synchronised, which one node can do without", ""),
    ),
    "a clock of its own among two": (
        *(replace(MACHINE, clock=Clock(1.8e9, 0.0, False)), replace(RUN, nodes=2), "clock", WRONG),
        *("2027-01-15 08:00 UTC, and nothing keeps it synchronised", "start chrony or ntpd"),
    ),
}


@pytest.mark.parametrize(
    ("machine", "wants", "subject", "mark", "text", "way_out"), LINES.values(), ids=LINES
)
def test_the_line(
    machine: Machine, wants: Wants | None, subject: str, mark: Mark, text: str, way_out: str
) -> None:
    found = of(machine, subject, wants)
    assert (found.mark, found.text, found.way_out) == (mark, text, way_out)


def test_a_gpu_beyond_a_runs_processes_does_not_stop_it() -> None:
    ill = replace(GPU, index=1, uuid="GPU-b", faults=("x",))
    machine = replace(TWO, driver=Driver("580.95.05", (GPU, ill)))
    assert not of(machine, "GPU 1", RUN).stops
    assert of(machine, "GPU 1", replace(RUN, processes=2)).stops


def test_shared_memory_stops_no_run() -> None:
    machine = replace(MACHINE, folders=(Folder("shared memory", "/dev/shm", 1 << 26, True),))
    assert not of(machine, "shared memory", RUN).stops
