"""Compiles the fused operations: a family's `_cpu.so`, and `_cuda.so` where there is nvcc.

    python polycom_ext/ops/build.py [--cuda] [--output DIRECTORY]

`pip install . --no-build-isolation` does the same through setup.py. The libraries use torch's stable ABI and
no Python API: one build serves torch 2.11 and later and every Python. This file imports nothing of the
package, so that setup.py can load it before the package can be imported.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FAMILIES = {"polynomial": Path(__file__).resolve().parent / "polynomial"}
"""Folders with a family's sources in csrc and, when built, its libraries."""
OLDEST_TORCH = (2, 11)
TARGET_TORCH = "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
"""In the encoding of torch/csrc/stable/version.h."""
CUDA_ARCHITECTURES = ("80", "90", "100")
SMALL_SPILL = 32
"""Bytes a thread: a few registers of the widest instances, spilled, cost less than the block that it wins."""

_INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
}
_WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-unused-function"]
# GCC 12 warns of its own intrinsics, which start from a deliberately undefined register.
_WARNINGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
_CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", *_WARNINGS]


class BuildError(Exception):
    """A compiler is missing or refused a source: a sentence that says so, and the compiler's output."""

    def __init__(self, sentence: str, output: str = "") -> None:
        super().__init__(f"{sentence}\n{output}".rstrip())
        self.sentence = sentence


@dataclass(frozen=True)
class Torch:
    """Where the headers and libraries of the installed torch are, and its CUDA version (None: CPU)."""

    root: Path
    cuda: str | None

    @classmethod
    def find(cls) -> Torch:
        """The torch that can be imported; raises BuildError where it is missing or too old."""
        try:
            import torch
        except ImportError as error:
            sentence = "torch is not installed in the building environment (pip's build isolation hides it)"
            raise BuildError(sentence) from error
        if sentence := too_old(torch.__version__):
            raise BuildError(sentence)
        return cls(Path(torch.__file__).parent, torch.version.cuda)

    @property
    def include(self) -> list[str]:
        root = self.root / "include"
        return ["-isystem", str(root), "-isystem", str(root / "torch" / "csrc" / "api" / "include")]

    @property
    def link(self) -> list[str]:
        # Every symbol must be in a library that is linked: none is found by accident, in what else is loaded.
        return ["-Xlinker", "-zdefs", f"-L{self.root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]


def too_old(torch_version: str) -> str:
    """Why the operations do not work with a torch of this version; an alpha counts as its release."""
    found = re.match(r"(\d+)\.(\d+)", torch_version)
    if found is None or tuple(map(int, found.groups())) >= OLDEST_TORCH:
        return ""
    return "they need torch {}.{} or later, and this is {}".format(*OLDEST_TORCH, torch_version)


def sources_digest(sources: Path) -> str:
    """Sixteen hexadecimal digits of a csrc folder: a library says which sources it was built from."""
    digest = hashlib.sha256()
    for path in sorted(sources.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_cxx() -> str:
    """The C++ compiler: $CXX, else c++, g++ or clang++; raises BuildError without one."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if path := shutil.which(name):
            return path
    raise BuildError("no C++ compiler was found (set CXX)")


def find_nvcc() -> str:
    """nvcc: of $CUDA_HOME, else on PATH, else of /usr/local/cuda; raises BuildError without one."""
    home = os.environ.get("CUDA_HOME")
    for name in filter(None, (f"{home}/bin/nvcc" if home else None, "nvcc", "/usr/local/cuda/bin/nvcc")):
        if path := shutil.which(name):
            return path
    raise BuildError("nvcc was not found (set CUDA_HOME)")


def wants_cuda(torch: Torch) -> bool:
    """Whether torch is a CUDA build; POLYCOM_BUILD_CUDA=1 or 0 decides otherwise."""
    return torch.cuda is not None if (choice := cuda_demanded()) is None else choice


def cuda_demanded() -> bool | None:
    """What POLYCOM_BUILD_CUDA says; None if it is unset."""
    choice = os.environ.get("POLYCOM_BUILD_CUDA")
    return None if choice is None else choice not in ("", "0")


def run(command: Sequence[str]) -> str:
    """Run a compiler and return its output; raises BuildError with the output if it fails."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode:
        lines = result.stdout.splitlines() or [f"exit status {result.returncode}"]
        reason = next((line for line in lines if re.search(r"error|fatal|undefined", line)), lines[-1])
        raise BuildError(
            f"{Path(command[0]).name} failed: {reason.strip()}",
            f"{' '.join(command)}\n{result.stdout[-4000:]}",
        )
    return result.stdout


def run_all(commands: Iterable[Sequence[str]]) -> list[str]:
    """The same for several commands, as many at a time as `jobs`."""
    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(run, commands))


def jobs() -> int:
    """Compilers to run at a time: MAX_JOBS (torch's variable), else one a processor."""
    asked = os.environ.get("MAX_JOBS", "")
    return int(asked) if asked.isdecimal() and int(asked) else os.cpu_count() or 1


def instruction_sets() -> dict[str, list[str]]:
    """Instruction set -> compiler flags, for this machine's architecture."""
    if platform.machine() in ("x86_64", "AMD64"):
        return _INSTRUCTION_SETS
    return {"baseline": []}


def build_cpu(sources: Path, output: Path, torch: Torch) -> None:
    """Compile a family's CPU operations into the file `output`."""
    cxx = find_cxx()
    with tempfile.TemporaryDirectory() as scratch:
        objects = [Path(scratch) / "ops.o"]
        macros = [f"-DTORCH_TARGET_VERSION={TARGET_TORCH}", f'-DPOLYCOM_SOURCES="{sources_digest(sources)}"']
        source = str(sources / "cpu_ops.cpp")
        commands = [[cxx, *_CXX_FLAGS, *macros, *torch.include, "-c", source, "-o", str(objects[0])]]
        for name, flags in instruction_sets().items():
            objects.append(Path(scratch) / f"{name}.o")
            source = str(sources / "cpu_kernels.cpp")
            macro = f"-DPOLYCOM_ISA={name}"
            commands.append([cxx, *_CXX_FLAGS, *flags, macro, "-c", source, "-o", str(objects[-1])])
        run_all(commands)
        _link([cxx, "-shared", *map(str, objects), *torch.link], output)


def cuda_stamp(sources: Path, architectures: Sequence[str], ptx: str | None = None) -> str:
    """What a CUDA library says of itself: the sources it was built from, and what it holds code for.

    Divided at colons: nvcc divides what it is given at commas.
    """
    codes = [f"sm_{a}" for a in architectures] + ([] if ptx is None else [f"compute_{ptx}"])
    return ":".join([sources_digest(sources), *codes])


def cuda_flags(architectures: Sequence[str], ptx: str | None = None) -> list[str]:
    """Flags of nvcc for machine code of each architecture, and PTX of one for those that come later."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    if ptx is not None:
        codes.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    return [
        "-std=c++20",
        "-O3",
        "--expt-relaxed-constexpr",
        "-Xptxas",
        "-v",
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
        *codes,
    ]


@dataclass(frozen=True)
class Resources:
    """What a kernel takes on an architecture: registers a thread, bytes spilled, bytes of shared memory."""

    architecture: str
    kernel: str
    registers: int
    spilled: int
    shared: int


def resources(report: str) -> list[Resources]:
    """Of the output of ptxas -v."""
    pattern = (
        r"entry function '(\S+)' for 'sm_(\w+)'\n.*?(\d+) bytes spill stores"
        r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?"
    )
    return [
        Resources(architecture, kernel, int(registers), int(spilled), int(shared or 0))
        for kernel, architecture, spilled, registers, shared in re.findall(pattern, report, re.DOTALL)
    ]


def check_nvcc(nvcc: str, torch: Torch) -> None:
    """Raise BuildError if nvcc's major version is not that of torch's CUDA."""
    release = re.search(r"release (\d+)\.(\d+)", run([nvcc, "--version"]))
    if torch.cuda is None or release is None or release[1] == torch.cuda.split(".")[0]:
        return
    raise BuildError(
        f"{nvcc} is of CUDA {release[1]}.{release[2]} but torch of CUDA {torch.cuda}; set CUDA_HOME to a "
        "toolkit of torch's major version"
    )


def cuda_targets(nvcc: str) -> tuple[list[str], str | None]:
    """Architectures to compile machine code for, and the one to keep PTX of; "90" stands for sm_90.

    $TORCH_CUDA_ARCH_LIST ("8.0 9.0+PTX") decides as for torch's own extensions; without it those of
    CUDA_ARCHITECTURES that this nvcc knows, and PTX of the newest. Raises BuildError if that leaves none.
    """
    known = set(re.findall(r"sm_(\w+)", run([nvcc, "--list-gpu-code"])))
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    if not asked:
        chosen = [name for name in CUDA_ARCHITECTURES if name in known]
        if not chosen:
            raise BuildError(f"{nvcc} knows none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}; it is too old")
        return chosen, chosen[-1]
    chosen, ptx = [], None
    for item in asked:
        number = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if number is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST must hold numbers such as 8.0 or 9.0+PTX, got {item!r}")
        name = number[1] + number[2] + number[3]
        if name.rstrip("af") not in known:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST names {item}, which {nvcc} does not know: it is too old or new"
            )
        if int(number[1]) < 8:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST names {item}, but the kernels need 8.0 or later")
        chosen.append(name)
        ptx = name if number[4] else ptx
    return chosen, ptx


def build_cuda(sources: Path, output: Path, torch: Torch) -> list[Resources]:
    """Compile a family's CUDA operations into the file `output`; returns what the kernels take."""
    nvcc = find_nvcc()
    check_nvcc(nvcc, torch)
    targets = cuda_targets(nvcc)
    flags = cuda_flags(*targets)
    with tempfile.TemporaryDirectory() as scratch:
        objects = []
        commands = []
        for source in sorted(sources.glob("*.cu")):
            objects.append(str(Path(scratch) / f"{source.stem}.o"))
            include = torch.include if source.stem == "cuda_ops" else []
            macros = [f"-DTORCH_TARGET_VERSION={TARGET_TORCH}", "-DUSE_CUDA"] if include else []
            macros += [f'-DPOLYCOM_SOURCES="{cuda_stamp(sources, *targets)}"'] if include else []
            commands.append([nvcc, *flags, *macros, *include, "-c", str(source), "-o", objects[-1]])
        report = [used for output_of_nvcc in run_all(commands) for used in resources(output_of_nvcc)]
        _link([nvcc, "-shared", "--cudart", "static", *objects, *torch.link, "-ldl"], output)
    if spilling := {used.kernel for used in report if used.spilled > SMALL_SPILL}:
        print(
            f"warning: with this nvcc {len(spilling)} kernels spill registers, which makes them slower: "
            f"{', '.join(sorted(spilling))}",
            file=sys.stderr,
        )
    return report


def _link(command: list[str], output: Path) -> None:
    """Link beside the output and move it into place: no half-written library is ever seen.

    What was noted of a failure before is then no longer so.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        run([*command, "-o", str(partial)])
        partial.replace(output)
        failure_note(output).unlink(missing_ok=True)
    finally:
        partial.unlink(missing_ok=True)


def failure_note(library: Path) -> Path:
    """Where it is noted, beside a library, why it could not be built: pip hides the output of its builds."""
    return library.with_suffix(".failed.txt")


def note_failure(library: Path, error: BuildError) -> None:
    """Keep the sentence, as the first line, and the compiler's output for the warning at the first use."""
    library.parent.mkdir(parents=True, exist_ok=True)
    failure_note(library).write_text(f"{error}\n")


def main() -> int:
    """Build every family into the package, or into --output."""
    parser = argparse.ArgumentParser(description="Compile the fused operations.")
    parser.add_argument("--output", type=Path, help="directory of the libraries; default: each family's own")
    parser.add_argument("--cuda", action="store_true", help="the CUDA operations too")
    args = parser.parse_args()
    try:
        torch = Torch.find()
        for name, folder in FAMILIES.items():
            output = args.output / name if args.output else folder
            build_cpu(folder / "csrc", output / "_cpu.so", torch)
            if args.cuda or wants_cuda(torch):
                build_cuda(folder / "csrc", output / "_cuda.so", torch)
    except BuildError as error:
        print(f"the fused operations were not built: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
