"""Findings on a machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from polycom_ext.doctor.findings import Finding, Mark
from polycom_ext.machine.look import (
    PACKAGES,
    RUNS,
    SHARED,
    Clock,
    Compiler,
    Folder,
    Machine,
    Operations,
    Package,
    Torch,
)
from polycom_ext.machine.nvidia import Driver, Gpu

GIB = 1 << 30
LEAST_FREE = GIB
"""Bytes: less than that is soon full."""
MUCH_USED = 0.05
"""Of a GPU's memory, by somebody else."""
REBUILD = "pip install . --no-build-isolation"


@dataclass(frozen=True)
class Wants:
    """What a run asks of a machine."""

    processes: int
    """On this node."""
    nodes: int
    gpu: str
    """Why it cannot be rehearsed on a CPU; nothing where it can."""
    modules: Mapping[str, str]
    """Of other projects: module -> why."""


def judge(machine: Machine, wants: Wants | None) -> list[Finding]:
    """Findings on a machine, as to a run if one is given.

    What stops is what that run, or else this package, cannot work without.
    """
    modules = {} if wants is None else wants.modules
    others = tuple(one for one in machine.packages if one.module not in modules)
    asked = tuple(one for one in machine.packages if one.module in modules)
    return [
        Finding("python", Mark.OK, f"{machine.python}, {machine.executable} on {machine.system}"),
        torch_itself(machine.torch, machine.has_gpus),
        *formulas(machine),
        cpu_operations(machine.operations),
        gpu_operations(machine),
        driver(machine.driver),
        *(gpu(one, stops=uses(machine, one, wants)) for one in machine.driver.gpus),
        *([] if wants is None else [devices(machine, wants)]),
        nccl(machine, wants),
        nvcc(machine.nvcc, machine),
        *(needed_package(one, modules[one.module]) for one in asked),
        *(package(one, useful=wants is None and machine.has_gpus) for one in others),
        *(folder(one, wants is not None) for one in machine.folders),
        clock(machine.clock, 1 if wants is None else wants.nodes),
    ]


def torch_itself(torch: Torch, gpus: bool) -> Finding:
    """Whether torch can be imported, and has CUDA where there are GPUs."""
    if torch.version is None:
        way_out = "install torch: https://pytorch.org/get-started"
        if "No module named 'torch'" in torch.problem:
            return Finding("torch", Mark.MISSING, "not installed", way_out, stops=True)
        return Finding("torch", Mark.WRONG, torch.problem, f"re{way_out}", stops=True)
    if torch.cuda is None:
        text = f"{torch.version}, a build without CUDA"
        if gpus:
            return Finding("torch", Mark.WRONG, f"{text} beside a GPU", "install a CUDA build of torch")
        return Finding("torch", Mark.OK, text)
    text = f"{torch.version}, CUDA {torch.cuda}"
    if torch.cuda_problem and gpus:
        why = f"{text}, cannot use the GPUs: {torch.cuda_problem}"
        return Finding("torch", Mark.WRONG, why, "a driver for this CUDA, or a torch for this driver")
    return Finding("torch", Mark.OK, text)


def formulas(machine: Machine) -> Iterator[Finding]:
    """Whether the activations are what they are defined to be, on each device."""
    name, about = "polycom-ext", f"{machine.package}, {machine.package_path}"
    if machine.torch.version is None:
        yield Finding(name, Mark.WRONG, f"{about}: works only with torch", "see torch", stops=True)
        return
    if machine.operations.problem:
        way_out = f"{REBUILD}, or POLYCOM_OPS=eager to do without the fused operations"
        yield Finding(name, Mark.WRONG, f"{about}: {machine.operations.problem}", way_out, stops=True)
        return
    for device, checked in machine.operations.checked.items():
        off = [f"{one}: {said}" for one, said in checked.items() if said not in ("fused", "plain")]
        if off:
            way_out = f"{REBUILD}; if that does not help, POLYCOM_OPS=eager, and tell us"
            yield Finding(name, Mark.WRONG, f"on {device}: {'; '.join(off)}", way_out, stops=True)
        else:
            text = f"{len(checked)} activations are as defined, forward and backward, on {device}"
            yield Finding(name, Mark.OK, f"{about}; {text}")


def cpu_operations(operations: Operations) -> Finding:
    """Whether the fused operations run on the CPU, and for which activations."""
    name = "operations, CPU"
    if "cpu" in operations.fused_on:
        return Finding(name, Mark.OK, f"{_fused(operations, 'cpu')} ({operations.instruction_set})")
    return _not_fused(name, operations)


def gpu_operations(machine: Machine) -> Finding:
    """The same of the GPUs, and for which architectures there is code."""
    name, operations = "operations, GPU", machine.operations
    if not machine.has_gpus:
        return Finding(name, Mark.UNNEEDED, "no GPU")
    if "cuda" not in operations.fused_on:
        return _not_fused(name, operations)
    code = f"code for {', '.join(operations.architectures) or 'unknown architectures'}"
    for index, problem in enumerate(operations.gpu_problems):
        if problem:
            capability = machine.torch.devices[index].capability
            way_out = f"TORCH_CUDA_ARCH_LIST={capability} {REBUILD}"
            return Finding(name, Mark.MISSING, f"{code}; on cuda:{index} they do not run: {problem}", way_out)
    if not operations.gpu_problems:
        return Finding(name, Mark.WRONG, f"{code}, and torch has no GPU", "see torch")
    return Finding(name, Mark.OK, f"{_fused(operations, 'cuda:0')}; {code}")


def _not_fused(name: str, operations: Operations) -> Finding:
    why = operations.fused_problem or operations.problem or "POLYCOM_OPS=eager asks for plain operations"
    return Finding(name, Mark.MISSING, f"plain operations serve, more slowly: {why}")


def _fused(operations: Operations, device: str) -> str:
    checked = operations.checked.get(device, {})
    fused = [name for name, said in checked.items() if said == "fused"]
    return f"fused: {', '.join(fused) or 'none'}"


def driver(found: Driver) -> Finding:
    """NVIDIA's driver."""
    name = "driver"
    if found.problem:
        way_out = (
            "in a container, give it the driver's programs (NVIDIA_DRIVER_CAPABILITIES=compute,utility); "
            "else `dmesg` says more, and a reboot or another driver helps"
        )
        return Finding(name, Mark.WRONG, found.problem, way_out)
    if not found.gpus:
        return Finding(name, Mark.UNNEEDED, "no NVIDIA driver, no GPU")
    return Finding(name, Mark.OK, f"{found.version}, {len(found.gpus)} GPU{'s' * (len(found.gpus) > 1)}")


def gpu(found: Gpu, stops: bool) -> Finding:
    """One GPU and its health. Faults and somebody else's work stop a run on it; a low clock does not."""
    name, text = f"GPU {found.index}", _described(found)
    if found.faults:
        way_out = f"nvidia-smi --gpu-reset -i {found.index}, or a reboot; if it comes back, have it replaced"
        return Finding(name, Mark.WRONG, f"{text}: {'; '.join(found.faults)}", way_out, stops)
    if used_by := _others(found):
        way_out = "end them, or name other GPUs in CUDA_VISIBLE_DEVICES"
        return Finding(name, Mark.WRONG, f"{text}: in use by {used_by}", way_out, stops)
    if found.slowed:
        way_out = "look after cooling and power: nvidia-smi -q -d PERFORMANCE"
        return Finding(name, Mark.WRONG, f"{text}: {', '.join(found.slowed)}", way_out)
    return Finding(name, Mark.OK, text)


def uses(machine: Machine, found: Gpu, wants: Wants | None) -> bool:
    """Whether a run would be on this GPU: its processes take torch's first ones."""
    if wants is None:
        return False
    return found.uuid in [device.uuid for device in machine.torch.devices[: wants.processes]]


def devices(machine: Machine, wants: Wants) -> Finding:
    """Whether there is a device for each process of a run."""
    name, count = "devices", len(machine.torch.devices)
    hidden = (
        f" (CUDA_VISIBLE_DEVICES={machine.visible_devices})" if machine.visible_devices is not None else ""
    )
    asked = f"{wants.processes} process{'es' * (wants.processes > 1)} a node"
    if count >= wants.processes:
        return Finding(name, Mark.OK, f"{asked}, {count} GPU{'s' * (count > 1)}{hidden}")
    if count:
        way_out = f"--set processes_per_node={count}, or a machine with {wants.processes}"
        return Finding(
            name,
            Mark.MISSING,
            f"{asked}, and torch has {count} GPU{'s' * (count > 1)}{hidden}",
            way_out,
            stops=True,
        )
    if wants.gpu:
        way_out = "a machine with GPUs and a CUDA build of torch"
        return Finding(name, Mark.MISSING, f"torch has no GPU{hidden}, and {wants.gpu}", way_out, stops=True)
    return Finding(name, Mark.OK, f"{asked}, rehearsed on the CPU: torch has no GPU{hidden}")


def _others(found: Gpu) -> str:
    """Who works on it; in a container its processes are not seen, but their memory is."""
    if found.processes:
        return ", ".join(f"{one.name} (process {one.pid})" for one in found.processes)
    if found.used_mib is not None and found.memory_mib and found.used_mib > MUCH_USED * found.memory_mib:
        return f"processes that are not seen from here, with {_gib(found.used_mib)}"
    return ""


def _described(found: Gpu) -> str:
    clocks = None if found.mhz is None or found.max_mhz is None else f"{found.mhz} of {found.max_mhz} MHz"
    facts = (
        found.name,
        found.capability and f"compute capability {found.capability}",
        None if found.memory_mib is None else _gib(found.memory_mib),
        None if found.celsius is None else f"{found.celsius} °C",
        clocks and (f"{clocks}, held by a setting" if found.clocks_set else clocks),
        None if found.ecc is None else f"ECC {'on' if found.ecc else 'off'}",
        "divided by MIG" if found.mig else None,
    )
    return ", ".join(filter(None, facts))


def _gib(mib: int) -> str:
    return f"{mib / 1024:.0f} GiB"


def nccl(machine: Machine, wants: Wants | None) -> Finding:
    """What GPUs talk by."""
    if not machine.torch.devices:
        return Finding("NCCL", Mark.UNNEEDED, "torch has no GPU")
    if machine.torch.nccl is None:
        stops = wants is not None and wants.processes * wants.nodes > 1
        return Finding("NCCL", Mark.MISSING, "this torch has none", "install a torch built with NCCL", stops)
    return Finding("NCCL", Mark.OK, machine.torch.nccl)


def nvcc(found: Compiler, machine: Machine) -> Finding:
    """The CUDA compiler: wanted where our operations are to be built."""
    text = "not found" if found.path is None else f"{found.release}, {found.path}"
    if "cuda" in machine.operations.fused_on or machine.torch.cuda is None:
        return Finding("nvcc", Mark.UNNEEDED, f"{text}; there is nothing to build")
    if found.path is None:
        return Finding("nvcc", Mark.MISSING, text, "install a CUDA toolkit, or set CUDA_HOME to it")
    if found.problem:
        return Finding("nvcc", Mark.WRONG, found.problem)
    return Finding("nvcc", Mark.OK, text)


def package(found: Package, useful: bool) -> Finding:
    """A package of another project that no run has asked for; `useful`: some could, on this machine."""
    one = needed_package(found, "")
    if one.mark is Mark.OK or (useful and one.mark is Mark.WRONG) or found.foreign:
        return replace(one, stops=False)
    if useful:
        return replace(one, stops=False, way_out=f"{one.way_out}, if a run of yours asks for it")
    return replace(one, stops=False, way_out="", mark=Mark.UNNEEDED)


def needed_package(found: Package, why: str) -> Finding:
    """A package of another project that a run cannot do without, for a reason."""
    name = PACKAGES.get(found.module, found.module)
    because = f"; {why}" if why else ""
    way_out = f"install {name} for this torch"
    if found.foreign:
        text = f"{found.path} is another project of that name ({found.foreign})"
        there = "pip uninstall apex; NVIDIA's comes from https://github.com/NVIDIA/apex"
        return Finding(name, Mark.WRONG, f"{text}{because}", there, stops=True)
    if found.problem:
        text = f"{found.version or found.module} cannot be imported: {found.problem}"
        return Finding(name, Mark.WRONG, f"{text}{because}", f"re{way_out}", stops=True)
    if not found.imported:
        return Finding(name, Mark.MISSING, f"not installed{because}", way_out, stops=True)
    text = found.version or found.path
    if found.module == "transformer_engine.pytorch":
        text += f"; extension API: {', '.join(found.features) or 'none, which 2.13 began'}"
    return Finding(name, Mark.OK, text)


def folder(found: Folder, for_run: bool) -> Finding:
    """A place that is written to."""
    name = found.purpose if found.purpose == SHARED else f"disk, {found.purpose}"
    text, stops = f"{found.free / GIB:.1f} GiB free in {found.path}", for_run and found.purpose == RUNS
    if found.problem:
        return Finding(name, Mark.WRONG, found.problem)
    if not found.writable:
        return Finding(name, Mark.WRONG, f"{found.path} cannot be written to", "name another place", stops)
    if found.free < LEAST_FREE:
        way_out = "make room"
        if found.purpose == SHARED:
            way_out = "give the container more: docker run --ipc=host, or --shm-size"
        return Finding(name, Mark.WRONG, text, way_out, stops)
    return Finding(name, Mark.OK, text)


def clock(found: Clock, nodes: int) -> Finding:
    """The system's clock; several nodes must agree."""
    text = f"{datetime.fromtimestamp(found.now, timezone.utc):%Y-%m-%d %H:%M} UTC"
    if found.now < found.newest_file - 60:
        newest = f"{datetime.fromtimestamp(found.newest_file, timezone.utc):%Y-%m-%d %H:%M}"
        why = f"{text}, but a file of this package is of {newest}"
        return Finding("clock", Mark.WRONG, why, "set it: certificates and records need the right time")
    if found.synchronised is None:
        return Finding("clock", Mark.OK, f"{text}; whether it is synchronised is not told here")
    if found.synchronised:
        return Finding("clock", Mark.OK, f"{text}, synchronised")
    if nodes == 1:
        return Finding(
            "clock", Mark.OK, f"{text}; nothing keeps it synchronised, which one node can do without"
        )
    return Finding("clock", Mark.WRONG, f"{text}, and nothing keeps it synchronised", "start chrony or ntpd")
