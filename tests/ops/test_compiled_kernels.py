"""What nvcc makes of the CUDA kernels, beside the committed table; and that the library loads."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polycom_ext.ops import build
from polycom_ext.ops.polynomial import library

from ..scripts import BENCHMARKS, script
from . import binaries

TABLE = BENCHMARKS / "results" / "kernels.csv"


kernels = script("kernels")


def _missing() -> str:
    try:
        kernels.find_nvdisasm()
        release = kernels.nvcc_release()
    except build.BuildError as error:
        return str(error)
    return "" if release == "13.0" else f"the table is of nvcc 13.0, here is {release}"


needs_compilers = pytest.mark.skipif(bool(_missing()), reason=_missing() or "nothing is missing")


def test_ptxas_is_read_kernel_by_kernel() -> None:
    report = (
        "ptxas info    : Compiling entry function 'first' for 'sm_80'\n"
        "ptxas info    : Function properties for first\n"
        "    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 64 registers, used 0 barriers, 484 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function 'first' for 'sm_90'\n"
        "ptxas info    : Function properties for first\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 72 registers, used 1 barriers, 1024 bytes smem\n"
    )
    assert build.resources(report) == [
        build.Resources("80", "first", 64, 4, 0),
        build.Resources("90", "first", 72, 0, 1024),
    ]


def test_slots_are_counted_within_the_loop_over_rows() -> None:
    kernel = kernels.Kernel("backward", "BFloat16Storage", 3, False, False, 4, 128, 5, False)
    mangled = "backward_kernelINS0_15BFloat16StorageELi3ELb0ELb0ELi4ELi128ELi5ELb0EEE"
    work = "        /*0030*/ FFMA R1, R1, R1, R1 ;\n" * 30
    vectors = "".join(f"        /*0020*/ @P0 BRA `(.L_x_{k}) ;\n{work}.L_x_{k}:\n" for k in range(1, 5))
    sass = (
        f".text.{mangled}:\n        /*0000*/ MOV R1, R1 ;\n.L_x_9:\n        /*0010*/ MOV R1, R1 ;\n{vectors}"
        "        /*0040*/ @!P0 BRA `(.L_x_9) ;\n        /*0050*/ EXIT ;\n"
    )
    assert kernels.row_loop_slots(sass) == {kernel: kernels.Slots(beside=1 + 4 + 1, vector=30)}


def test_a_vectors_slots_are_counted_once_though_skips_lie_within_others() -> None:
    """As where the rest of a row is skipped, and in it each vector."""
    mangled = "quantized_kernelINS0_15BFloat16StorageELi3ELb0ELNS_6RecipeE1ELi4ELi128ELi8EEE"
    work = "        /*0030*/ FFMA R1, R1, R1, R1 ;\n" * 30
    vectors = "".join(
        f"        /*0020*/ @P0 BRA `(.L_x_8) ;\n        /*0020*/ @P1 BRA `(.L_x_{k}) ;\n{work}.L_x_{k}:\n"
        for k in range(1, 5)
    )
    sass = (
        f".text.{mangled}:\n        /*0000*/ MOV R1, R1 ;\n.L_x_9:\n        /*0010*/ MOV R1, R1 ;\n{vectors}"
        ".L_x_8:\n        /*0040*/ @!P0 BRA `(.L_x_9) ;\n        /*0050*/ EXIT ;\n"
    )
    kernel = kernels.Kernel("quantized_BLOCKS", "BFloat16Storage", 3, False, False, 4, 128, 8, False)
    in_skips = 4 * 32 - 1  # but for the jump that begins the first of them
    vector = round(in_skips / 4)
    counted = kernels.Slots(beside=1 + 1 + 4 * 32 - 4 * vector, vector=vector)
    assert kernels.row_loop_slots(sass) == {kernel: counted}


def test_a_kernel_is_known_by_the_name_that_it_is_asked_for_with() -> None:
    """Of those that write FP8; the mangled name as nvcc makes it."""
    mangled = (
        "_ZN7polycom50_GLOBAL__N__36901ef7_17_cuda_quantized_cu_659e72b016quantized_kernelINS0_15BFloat16Storage"
        "ELi3ELb1ELNS_6RecipeE2ELi8ELi256ELi2EEEvNS_18QuantizedArgumentsEi"
    )
    kernel = kernels.Kernel.of_name(mangled)
    assert str(kernel) == "quantized_kernel<BFloat16Storage, 3, true, Recipe::MX, 8, 256, 2>"
    assert [kernel.exists_for(name) for name in ("80", "90", "100")] == [False, False, True]
    assert kernel in kernels.Choices.find().kernels


def test_the_table_is_written_as_it_is_read(tmp_path: Path) -> None:
    kernels.write_csv(tmp_path / "again.csv", kernels.read_csv(TABLE))
    assert (tmp_path / "again.csv").read_bytes() == TABLE.read_bytes()


def test_what_is_worse_than_the_table_is_named() -> None:
    row = next(row for row in kernels.read_csv(TABLE) if row.kernel.staged and row.slots_vector is not None)
    better = replace(row, registers=row.registers - 8, slots_vector=row.slots_vector - 1, shared=0)
    assert kernels.worse([row], [better]) == []
    for what, more in (
        ("registers", 128),
        ("spilled", 4),
        ("shared", 4),
        ("slots_beside", 1),
        ("slots_vector", 1),
    ):
        (said,) = kernels.worse([row], [replace(row, **{what: getattr(row, what) + more})])
        assert str(row.kernel) in said
    assert kernels.worse([], [row]) == [f"sm_{row.architecture} {row.kernel} is not in the table"]


def test_a_block_lost_by_narrower_rows_only_is_named() -> None:
    """Of 192 threads three fit with 110 registers and two with 120; of 256 threads two with either."""
    kernel = kernels.Kernel("forward", "FloatStorage", 3, False, False, 16, 256, 2, False)
    row = kernels.Row(
        "80", kernel, registers=110, spilled=0, shared=1280, blocks=2, slots_beside=1, slots_vector=1
    )
    (said,) = kernels.worse([row], [replace(row, registers=120)])
    assert "threads a processor" in said


@pytest.mark.parametrize("storage", kernels.STORAGES)
@pytest.mark.parametrize("card", ["A100", "H100", "H200"])
def test_the_model_expects_what_was_aimed_at(card: str, storage: str) -> None:
    """Of the committed table, at the widths of the paper and of the widest common models."""
    forward, backward = (0.80, 0.75) if card == "H200" else (0.90, 0.85)
    rows = kernels.read_csv(TABLE)
    expected = {
        (direction, width): share
        for direction, _, width, name, *_, share in kernels.predictions(
            rows, kernels.Choices.find(), [storage]
        )
        if name == card
    }
    for width in (1536, 8192, 8256, 16384):
        assert expected["forward", width] >= forward
        assert expected["backward", width] >= backward


def test_fp8_is_expected_to_move_three_bytes_an_element_at_half_the_rate_of_a_copy_or_more() -> None:
    text = TABLE.with_suffix(".md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    found = {(one[0], one[2], one[3]): one for one in cells if one[0].startswith("quantized_")}
    assert {direction for direction, _, _ in found} == {"quantized_TENSOR", "quantized_BLOCKS"}
    assert {card for _, _, card in found} == {"H100", "H200"}  # an A100 has no FP8
    assert {one[8] for one in found.values()} == {"3"}
    assert all(float(one[9]) >= 0.5 for one in found.values())


@needs_compilers
def test_the_usual_instances_are_no_worse_than_the_table() -> None:
    """bfloat16, order 3, PolyNorm on sm_90, y as it is; all others are `full`."""
    usual = [
        kernel
        for kernel in kernels.Choices.find().kernels
        if kernel.usual and not kernel.recipe and (kernel.storage, kernel.order) == ("BFloat16Storage", 3)
    ]
    measured = list(kernels.measure(usual, ["90"]))
    assert len(measured) == len(usual) == 8
    assert not [row for row in measured if row.spilled]
    assert kernels.worse(kernels.read_csv(TABLE), measured) == []


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[build.Resources]]:
    """`_cuda.so` as `make wheel` builds it, and what its kernels take. Minutes: tests that ask are `full`."""
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    built = tmp_path_factory.mktemp("cuda") / "_cuda.so"
    return built, build.build_cuda(kernels.SOURCES, built, build.Torch.find())


@pytest.mark.full
@needs_compilers
@pytest.mark.parametrize(
    "orders", [pytest.param({3}, id="order 3"), pytest.param({1, 2, 4}, id="others", marks=pytest.mark.long)]
)
def test_the_cuda_library_is_no_worse_than_the_table(
    cuda: tuple[Path, list[build.Resources]], orders: set[int]
) -> None:
    """Every instance, for every architecture; slots, for which each is compiled once more, of some orders."""
    report = cuda[1]
    assert {used.architecture for used in report} == set(build.CUDA_ARCHITECTURES)
    assert not [used for used in report if used.spilled > build.SMALL_SPILL]
    choices = kernels.Choices.find()
    built = {kernels.Kernel.of_name(used.kernel) for used in report} - {None}
    assert built == set(choices.kernels)
    counting = [kernel for kernel in choices.kernels if kernel.order in orders]
    slots = {
        (architecture, kernel): counted
        for architecture in build.CUDA_ARCHITECTURES
        for kernel, counted in kernels.count_slots(counting, architecture).items()
    }
    assert kernels.worse(kernels.read_csv(TABLE), kernels.rows_of(report, slots)) == []


@pytest.mark.full
def test_the_cuda_library_holds_code_for_every_gpu_from_sm_80(
    cuda: tuple[Path, list[build.Resources]],
) -> None:
    held = binaries.device_code(cuda[0])
    sources = list(kernels.SOURCES.glob("*.cu"))
    assert held.count({"sm_80", "sm_90", "sm_100", "compute_100"}) == len(sources)
    assert len(held) == len(sources) + 1, "the rest is the CUDA runtime's own, linked statically"


def test_the_cpu_library_asks_for_nothing_that_a_machine_with_torch_may_lack() -> None:
    _asks_little(Path(library.__file__).with_name("_cpu.so"))


@pytest.mark.full
def test_the_cuda_library_asks_for_nothing_that_a_machine_with_torch_may_lack(
    cuda: tuple[Path, list[build.Resources]],
) -> None:
    """No CUDA runtime, no driver, no libtorch_cuda: it must load beside a CPU build of torch too."""
    _asks_little(cuda[0])


def _asks_little(path: Path) -> None:
    needed = binaries.needed(path)
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed - binaries.TORCH if not binaries.of_every_linux(name)] == []
    assert binaries.search_paths(path) == []
    assert binaries.symbols_of_torchs_cpp(path) == []


@pytest.mark.full
def test_the_cuda_library_loads_and_says_in_a_sentence_what_a_machine_lacks(
    cuda: tuple[Path, list[build.Resources]], tmp_path: Path
) -> None:
    """A stand-in is the libtorch_cuda that a CPU torch lacks, loaded as CUDA builds of torch load theirs.

    Its symbols are not everybody's.
    """
    stand_in = tmp_path / "libtorch_cuda.so"
    source = tmp_path / "stream.c"
    source.write_text("int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n")
    compiler = [build.find_cxx(), "-x", "c", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
    subprocess.run([*compiler, str(source), "-o", str(stand_in)], check=True)
    script = (
        "import ctypes, pathlib, sys, torch\n"
        "from polycom_ext.ops.polynomial import library\n"
        "if torch.version.cuda is None and sys.argv[2]: ctypes.CDLL(sys.argv[2], ctypes.RTLD_LOCAL)\n"
        "torch.version.cuda = torch.version.cuda or '13.0'\n"
        "assert library._load_cuda(pathlib.Path(sys.argv[1])) == ''\n"
        "of_sums = ('_sums', '_from_sums', '_backward_sums', '_backward_from_sums')\n"
        "for name in ('', '_backward', '_quantized', *of_sums):\n"
        "    operator = f'polycom::polynomial{name}'\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, 'CUDA'), name\n"
        "build = torch.ops.polycom.polynomial_cuda_build()\n"
        "assert build.endswith(':sm_80:sm_90:sm_100:compute_100'), build\n"
        "print(library.gpu_problem(0))\n"
    )

    def problem(torch_cuda: str) -> str:
        command = [sys.executable, "-c", script, str(cuda[0]), torch_cuda]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    lacking = "libtorch_cuda.so has no aoti_torch_get_current_cuda_stream"
    assert problem(str(stand_in)) != lacking
    if torch.version.cuda is None:
        assert problem("") == lacking
    if not torch.cuda.is_available():
        assert re.fullmatch(r"[^\n]*(driver|device)[^\n]*", problem(str(stand_in)))
