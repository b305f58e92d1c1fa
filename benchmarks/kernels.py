"""What the compiler made of the CUDA kernels, and the share of a copy's bandwidth that a model expects.

    python benchmarks/kernels.py     # every instance; writes benchmarks/results/kernels.csv and .md

Needs nvcc, and nvdisasm (PyPI nvidia-cuda-nvdisasm); no GPU. The CSV has a row an instance and architecture:
registers and spilled bytes (ptxas -v), blocks that a processor holds, and the issue slots that a warp takes
for a row in the usual call (whole rows of finite numbers, no variants), which is compiled by itself, so that
the instructions of the loop over rows are those that run. The tests compare a build with it: what makes a
kernel worse must change the table. The Markdown file has the model, and its assumptions.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from polycom_ext.ops import build

SOURCES = build.FAMILIES["polynomial"] / "csrc"
RESULTS = Path(__file__).parent / "results"
STORAGES = {"FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16"}
NARROW_THREADS = 128
"""Of a block in which every warp has a row of its own, as in cuda_kernels.cuh."""
RECIPES = {"TENSOR": 89, "BLOCKS": 89, "MX": 100}
"""Of the kernels that write FP8 (csrc/quantized_arguments.h), with the first architecture that has one."""
WIDTHS = (1024, 1536, 5504, 8192, 8256, 11008, 14336, 16384)
"""1536 and 8256 are the paper's, 5504 its gated one; the others are common in other models."""


@dataclass(frozen=True)
class Kernel:
    """The template arguments of one instance."""

    direction: str
    storage: str
    order: int
    rectified: bool
    biased: bool
    vectors: int
    threads: int
    asked: int
    """Blocks a processor that __launch_bounds__ asks for."""
    staged: bool
    """Whether the next row is on its way to shared memory meanwhile."""

    @classmethod
    def of_name(cls, mangled: str) -> Kernel | None:
        """None for a kernel without instances of this kind, such as sum_terms_kernel."""
        pattern = (
            r"(forward|backward)_kernelINS0_\d+(\w+?)ELi(\d)ELb(\d)ELb(\d)ELi(\d+)ELi(\d+)ELi(\d+)E(Lb1)?"
        )
        if (found := re.search(pattern, mangled)) is None:
            return cls._of_quantized_name(mangled)
        direction, storage, order, rectified, biased, vectors, threads, asked, staged = found.groups()
        flags = (rectified == "1", biased == "1")
        hold = (int(vectors), int(threads), int(asked))
        return cls(direction, storage, int(order), *flags, *hold, staged is not None)

    @classmethod
    def _of_quantized_name(cls, mangled: str) -> Kernel | None:
        pattern = r"quantized_kernelINS0_\d+(\w+?)ELi(\d)ELb(\d)ELNS_6RecipeE(\d)ELi(\d+)ELi(\d+)ELi(\d+)E"
        if (found := re.search(pattern, mangled)) is None:
            return None
        storage, order, rectified, recipe, *hold = found.groups()
        direction = f"quantized_{tuple(RECIPES)[int(recipe)]}"
        vectors, threads, asked = map(int, hold)
        return cls(direction, storage, int(order), rectified == "1", False, vectors, threads, asked, False)

    @property
    def recipe(self) -> str:
        """Of those that write FP8; else nothing."""
        return self.direction.partition("quantized_")[2]

    def exists_for(self, architecture: str) -> bool:
        """Whether more than an empty kernel is compiled (is_compiled in cuda_quantized.cuh)."""
        return not self.recipe or int(architecture) >= RECIPES[self.recipe]

    def __str__(self) -> str:
        if self.recipe:
            flags = f"{str(self.rectified).lower()}, Recipe::{self.recipe}"
            hold = f"{self.vectors}, {self.threads}, {self.asked}"
            return f"quantized_kernel<{self.storage}, {self.order}, {flags}, {hold}>"
        flags = f"{self.rectified}, {self.biased}".lower()
        hold = f"{self.vectors}, {self.threads}, {self.asked}"
        hold += f", {self.staged}".lower() if self.direction == "backward" else ""
        return f"{self.direction}_kernel<{self.storage}, {self.order}, {flags}, {hold}>"

    @property
    def block_sizes(self) -> range:
        """The threads of a block that it is launched with: few where a row is narrower than it holds.

        A row that one warp can hold is not held by a block.
        """
        least = self.threads if self.threads == NARROW_THREADS else 64 if self.vectors else 32
        return range(least, self.threads + 1, 32)

    def staged_bytes(self, threads: int) -> int:
        """Dynamic shared memory of such a block, for a row of x and one of y's gradient."""
        return 2 * threads * self.vectors * 16 if self.staged else 0

    @property
    def bytes_moved(self) -> int:
        """Of an element, what cannot be avoided; scales of FP8 are few beside it."""
        element = 4 if self.storage == "FloatStorage" else 2
        if self.recipe:
            return element + 1
        return element * (3 if self.direction == "backward" else 2)

    @property
    def usual(self) -> bool:
        """Whether its slots are counted: PolyNorm, no bias before, the row in registers."""
        return not self.rectified and not self.biased and self.vectors > 0


@dataclass(frozen=True)
class Row:
    """One instance on one architecture; slots as in Slots, None where they are not counted."""

    architecture: str
    kernel: Kernel
    registers: int
    spilled: int
    shared: int
    blocks: int
    slots_beside: int | None
    slots_vector: int | None

    def blocks_of(self, threads: int) -> int:
        """Blocks of so many threads that a processor holds; `blocks` are those of the widest."""
        shared = self.shared + self.kernel.staged_bytes(threads)
        return resident_blocks(self.architecture, threads, self.registers, shared)

    def slots(self, width: int, threads_per_row: int) -> int:
        """Of all warps, for a row of that width."""
        assert self.slots_beside is not None
        assert self.slots_vector is not None
        per_vector = 4 if self.kernel.storage == "FloatStorage" else 8
        vectors = -(-width // per_vector // 32)
        return threads_per_row // 32 * self.slots_beside + vectors * self.slots_vector


def resident_blocks(architecture: str, threads: int, registers: int, shared: int) -> int:
    """Blocks that a processor holds: 64 Ki registers, by eights a thread, 2048 threads, 32 blocks."""
    warps = -(-threads // 32)
    of_registers = 65536 // (-(-registers // 8) * 8 * 32) // warps
    of_shared = (164 if architecture == "80" else 228) * 1024 // (shared + 1024)
    return min(of_registers, of_shared, 64 // warps, 32)


def find_nvdisasm() -> str:
    """On PATH, of $CUDA_HOME or of the package nvidia-cuda-nvdisasm; raises BuildError without one."""
    packages = [str(Path(path) / "nvidia" / "cu13" / "bin") for path in sys.path if path]
    home = os.environ.get("CUDA_HOME")
    for path in (None, f"{home}/bin" if home else None, *packages):
        if found := shutil.which("nvdisasm", path=path):
            return found
    raise build.BuildError("nvdisasm was not found (pip install nvidia-cuda-nvdisasm)")


@dataclass(frozen=True)
class Slots:
    """Instructions that a warp issues for a row: for each of its vectors of 32 threads, and beside them."""

    beside: int
    vector: int


def row_loop_slots(sass: str) -> dict[Kernel, Slots]:
    """Of each kernel's loop over rows, which is of all its loops that which begins first.

    What is done to a vector is skipped, by a jump, where the row has no such vector.
    """
    slots: dict[Kernel, Slots] = {}
    for name, body in re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", sass, re.MULTILINE | re.DOTALL):
        if (kernel := Kernel.of_name(name)) is None:
            continue
        labels: dict[str, int] = {}
        jumps: list[tuple[int, str]] = []
        lines = re.findall(r"^(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(.*?);", body, re.MULTILINE)
        count = 0
        for label, instruction in lines:
            if label:
                labels[label] = count
                continue
            count += 1
            if jump := re.match(r"(?:@!?U?P\d )?BRA `\((\.L_x_\d+)\)", instruction):
                jumps.append((count, jump[1]))
        begin, end = min((labels[to], at) for at, to in jumps if labels[to] < at)
        skips = sorted(
            (at, labels[to]) for at, to in jumps if begin < at < labels[to] < end and labels[to] - at > 20
        )
        skipped, reached = 0, begin  # a skip may lie within another one
        for at, to in skips:
            skipped += max(0, to - max(at, reached))
            reached = max(reached, to)
        vector = round(skipped / kernel.vectors)
        slots[kernel] = Slots(end - begin - vector * kernel.vectors, vector)
    return slots


def count_slots(kernels: Iterable[Kernel], architecture: str) -> dict[Kernel, Slots]:
    """Compile the usual call of those kernels that it is counted for, and count."""
    usual = [kernel for kernel in kernels if kernel.usual and kernel.exists_for(architecture)]
    with tempfile.TemporaryDirectory() as scratch:
        cubin = str(Path(scratch) / "usual.cubin")
        _compile(usual, architecture, cubin, "-DPOLYCOM_UNUSUAL(condition)=false")
        return row_loop_slots(build.run([find_nvdisasm(), "-c", cubin]))


def _compile(kernels: list[Kernel], architecture: str, output: str, *flags: str) -> str:
    source = Path(output).with_suffix(".cu")
    pointers = "".join(f"  (const void*){kernel},\n" for kernel in kernels)
    source.write_text(
        '#include "cuda_quantized.cuh"\nusing namespace polycom;\n'
        f"extern const void* const instances[] = {{\n{pointers}}};\n"
    )
    command = [build.find_nvcc(), *build.cuda_flags([architecture]), f"-I{SOURCES}", *flags]
    return build.run([*command, "-cubin", str(source), "-o", output])


def rows_of(report: list[build.Resources], slots: dict[tuple[str, Kernel], Slots]) -> list[Row]:
    """The table's rows of what ptxas reported."""
    rows = []
    for used in report:
        if (kernel := Kernel.of_name(used.kernel)) is None or not kernel.exists_for(used.architecture):
            continue
        shared = used.shared + kernel.staged_bytes(kernel.threads)
        blocks = resident_blocks(used.architecture, kernel.threads, used.registers, shared)
        taken = (used.registers, used.spilled, used.shared, blocks)
        counted = slots.get((used.architecture, kernel))
        two = (None, None) if counted is None else (counted.beside, counted.vector)
        rows.append(Row(used.architecture, kernel, *taken, *two))
    return sorted(rows, key=lambda row: (row.architecture, str(row.kernel)))


def measure(kernels: list[Kernel], architectures: Iterable[str]) -> Iterator[Row]:
    """Compile the instances, those of a storage type and order together, and count."""
    units = [
        ([kernel for kernel in kernels if (kernel.storage, kernel.order) == unit], architecture)
        for unit in sorted({(kernel.storage, kernel.order) for kernel in kernels})
        for architecture in architectures
    ]
    with ThreadPoolExecutor(build.jobs()) as pool:
        for rows in pool.map(lambda unit: _measure(*unit), units):
            yield from rows


def _measure(kernels: list[Kernel], architecture: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        report = build.resources(_compile(kernels, architecture, str(Path(scratch) / "all.cubin")))
    counted = count_slots(kernels, architecture)
    print(f"sm_{architecture} {kernels[0].storage} order {kernels[0].order}", file=sys.stderr)
    return rows_of(report, {(architecture, kernel): slots for kernel, slots in counted.items()})


_LIST = """
#include <cstdio>
#include "cuda_quantized.cuh"
using namespace polycom;
constexpr int MOST_SHARED = 163 * 1024;  // of a block on an A100; an H100 has more
void list(const char* direction, const Hold (&holds)[HOLDS], int count, char** widths) {
  for (const Hold& hold : holds) {
    printf("hold %s %d %d %d %d %d %d %d\\n", direction, hold.vectors, hold.threads,
           asked_blocks(hold, false), asked_blocks(hold, true), int(hold.staged), int(hold.biased),
           staged_bytes(hold, hold.threads));
  }
  for (int at = 1; at < count; ++at) {
    for (int per_vector : {4, 8}) {
      const Shape shape = choose_shape(atoll(widths[at]), per_vector, true, false, holds, MOST_SHARED);
      printf("shape %s %s %d %d %d %d %d\\n", direction, widths[at], per_vector, shape.hold,
             shape.threads_per_row, shape.threads, shape.shared);
    }
  }
}
void list_quantized() {
  for (int at = LOOPED + 1; at < HOLDS; ++at) {
    for (bool rectify : {false, true}) {
      for (Recipe recipe : {Recipe::TENSOR, Recipe::BLOCKS, Recipe::MX}) {
        const Hold& hold = FORWARD_HOLDS[at];
        printf("quantized forward %d %d %d %d %d\\n", int(recipe), int(rectify), hold.vectors, hold.threads,
               quantized_blocks(hold, rectify, recipe));
      }
    }
  }
}
int main(int count, char** widths) {
  list_quantized();
  list("forward", FORWARD_HOLDS, count, widths);
  list("backward", BACKWARD_HOLDS, count, widths);
}
"""


@dataclass(frozen=True)
class Shape:
    """How an instance is launched for a width: `hold` as in cuda_launch.cuh, threads, dynamic memory."""

    hold: tuple[int, int, int, bool]
    threads_per_row: int
    threads: int
    shared: int


@dataclass(frozen=True)
class Choices:
    """What cuda_launch.cuh says of itself."""

    kernels: list[Kernel]
    shapes: dict[tuple[str, int, str], Shape]
    """Of (direction, width, storage)."""

    @classmethod
    def find(cls) -> Choices:
        emulator = Path(__file__).parents[1] / "tests" / "ops"
        with tempfile.TemporaryDirectory() as scratch:
            source, program = Path(scratch) / "list.cpp", Path(scratch) / "list"
            source.write_text(_LIST)
            include = [f"-I{SOURCES}", f"-I{emulator}"]
            build.run([build.find_cxx(), "-std=c++20", "-w", *include, str(source), "-o", str(program)])
            lines = [line.split() for line in build.run([str(program), *map(str, WIDTHS)]).splitlines()]
        holds: dict[str, list[tuple[int, int, int, bool]]] = {"forward": [], "backward": []}
        kernels, shapes = [], {}
        for kind, direction, *rest in lines:
            if kind == "quantized":
                recipe, rectify, vectors, threads, blocks = map(int, rest)
                named = f"quantized_{tuple(RECIPES)[recipe]}"
                flags = (bool(rectify), False)
                kernels.append(Kernel(named, "BFloat16Storage", 3, *flags, vectors, threads, blocks, False))
            elif kind == "hold":
                vectors, threads, blocks, biased_blocks, staged, has_biased, dynamic = map(int, rest)
                holds[direction].append((vectors, threads, blocks, bool(staged)))
                kernels += [
                    Kernel(
                        direction,
                        storage,
                        order,
                        rectified,
                        biased,
                        vectors,
                        threads,
                        biased_blocks if biased else blocks,
                        bool(staged),
                    )
                    for storage in STORAGES
                    for order in (1, 2, 3, 4)
                    for rectified in (False, True)
                    for biased in ((False, True) if has_biased else (False,))
                ]
                assert kernels[-1].staged_bytes(threads) == dynamic
            else:
                width, per_vector, hold, threads_per_row, threads, shared = map(int, rest)
                for storage in STORAGES:
                    if per_vector == (4 if storage == "FloatStorage" else 8):
                        shape = Shape(holds[direction][hold], threads_per_row, threads, shared)
                        shapes[direction, width, storage] = shape
        return cls(kernels, shapes)


@dataclass(frozen=True)
class Card:
    """What the model knows of a GPU; `latency` in cycles of `clock`, `copy` the rate of a large copy."""

    architecture: str
    processors: int
    clock: float
    copy: float
    latency: float


CARDS = {
    "A100": Card("80", 108, 1.41e9, 1.75e12, 500),
    "H100": Card("90", 132, 1.70e9, 3.00e12, 650),
    "H200": Card("90", 132, 1.94e9, 4.19e12, 650),
}
ASSUMPTIONS = """
The model is a closed queueing network, solved by mean-value analysis. Its customers are the row groups (a
warp, or a block) that a processor holds, a group twice where its next row is on its way to shared memory.
Each goes round: it waits for the memory's latency and its reduction, queues for memory (its loads and its
store, at the processor's part of the copy rate), and for the issue slots. Times of service vary as
exponential ones do: groups that stay staggered would do better, groups in step worse.

| card | architecture | processors | clock | copy | latency, unloaded |
|---|---|---|---|---|---|
{cards}

Measured: the copy rate and clock of the H200. Assumed: those of the others, and the latencies above; 85 % of
4 issue slots a cycle can be used, and 0.6 by one warp; a reduction takes 250 cycles within a warp and 400 in
a block; the start of a forward block 300 (backward's blocks stay). A shuffle counts as one slot, as does a
copy to or from shared memory.
The share is of the copy rate, of the bytes that cannot be avoided: {bytes}.
"""


def share_of_copy(card: Card, row: Row, shape: Shape, width: int) -> float:
    """By the model that ASSUMPTIONS describes."""
    memory = width * row.kernel.bytes_moved / (card.copy / card.processors / card.clock)
    warps = shape.threads_per_row // 32
    issued, usable = row.slots(width, shape.threads_per_row), 4 * 0.85
    alone = min(usable, 0.6 * warps)  # slots a cycle that one group can take
    wait = card.latency + (250 if warps == 1 else 400) + issued / alone - issued / usable
    wait += 0 if row.kernel.direction == "backward" else 300
    blocks = resident_blocks(row.architecture, shape.threads, row.registers, row.shared + shape.shared)
    groups = blocks * (shape.threads // shape.threads_per_row) * (2 if row.kernel.staged else 1)
    queues, throughput = [0.0, 0.0], 0.0
    for customers in range(1, groups + 1):
        times = [memory * (1 + queues[0]), issued / usable * (1 + queues[1])]
        throughput = customers / (wait + sum(times))
        queues = [throughput * time for time in times]
    return throughput * memory


def worse(committed: Iterable[Row], measured: Iterable[Row]) -> list[str]:
    """What of the measured rows is worse than what is committed, or not there; a sentence each."""
    known = {(row.architecture, row.kernel): row for row in committed}
    said = []
    for row in measured:
        before = known.get((row.architecture, row.kernel))
        name = f"sm_{row.architecture} {row.kernel}"
        if before is None:
            said.append(f"{name} is not in the table")
            continue
        for threads in row.kernel.block_sizes:
            if (now := row.blocks_of(threads)) < (then := before.blocks_of(threads)):
                said.append(f"{name} holds {now} blocks of {threads} threads a processor, before {then}")
                break
        for what in ("spilled", "shared"):
            if (now := getattr(row, what)) > (then := getattr(before, what)):
                said.append(f"{name} has {now} bytes {what}, before {then}")
        for what in ("slots_beside", "slots_vector"):
            now, then = getattr(row, what), getattr(before, what)
            if now is not None and now > then:
                said.append(f"{name} has {what} {now}, before {then}")
    return said


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line a row, with names of columns."""
    before, kernel, *after = [field.name for field in fields(Row)]
    with path.open("w", newline="") as file:
        names = [before, *(field.name for field in fields(Kernel)), *after]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            line = asdict(row)
            writer.writerow(line | line.pop(kernel))


_OF_TEXT: dict[object, Callable[[str], object]] = {
    "str": str,
    "int": int,
    "bool": "True".__eq__,
    "int | None": lambda text: int(text) if text else None,
}


def read_csv(path: Path) -> list[Row]:
    """What write_csv wrote."""

    def values(kind: type[Row] | type[Kernel], line: dict[str, str]) -> dict[str, Any]:
        read = [field for field in fields(kind) if field.name in line]
        return {field.name: _OF_TEXT[field.type](line[field.name]) for field in read}

    with path.open() as file:
        return [
            Row(**values(Row, line), kernel=Kernel(**values(Kernel, line))) for line in csv.DictReader(file)
        ]


def nvcc_release() -> str:
    """Such as 13.0; another compiler's kernels are others."""
    found = re.search(r"release ([\d.]+)", build.run([build.find_nvcc(), "--version"]))
    assert found is not None
    return found[1]


COLUMNS = "direction,type,width,card,row held in,registers,blocks,slots,bytes,share of copy".split(",")


def predictions(rows: list[Row], choices: Choices, storages: Iterable[str]) -> Iterator[tuple[object, ...]]:
    """(direction, type, width, card, instance, registers, blocks, slots, bytes, share) of order 3."""
    known = {(row.architecture, row.kernel): row for row in rows}
    kinds = [(direction, storage) for direction in ("forward", "backward") for storage in storages]
    kinds += [(f"quantized_{recipe}", "BFloat16Storage") for recipe in RECIPES]
    for (direction, storage), width in product(kinds, WIDTHS):
        # what is quantized is held as forward's rows are
        shape = choices.shapes["backward" if direction == "backward" else "forward", width, storage]
        kernel = Kernel(direction, storage, 3, False, False, *shape.hold)
        for name, card in CARDS.items():
            if (row := known.get((card.architecture, kernel))) is None:
                continue
            blocks = resident_blocks(
                row.architecture, shape.threads, row.registers, row.shared + shape.shared
            )
            slots = row.slots(width, shape.threads_per_row) * 32 / width
            held = f"{kernel.vectors} vectors, {shape.threads_per_row} of {shape.threads} threads"
            share = share_of_copy(card, row, shape, width)
            cells = (direction, STORAGES[storage], width, name, held, row.registers, blocks)
            yield (*cells, slots, kernel.bytes_moved, share)


def write_markdown(path: Path, rows: list[Row], choices: Choices) -> None:
    """The model's predictions and what they rest on."""
    cards = "\n".join(
        f"| {name} | sm_{card.architecture} | {card.processors} | {card.clock / 1e9:.2f} GHz "
        f"| {card.copy / 1e12:.2f} TB/s | {card.latency:.0f} cycles |"
        for name, card in CARDS.items()
    )
    moved = "forward x and y (quantized: a byte); backward x, the gradient of y and that of x"
    lines = [
        "# The CUDA kernels as compiled, and what a model expects of them",
        "",
        f"nvcc {nvcc_release()}; written by `python benchmarks/kernels.py`. "
        "**No share here was measured on a GPU**: the pages with a card's name have those that were.",
        ASSUMPTIONS.format(cards=cards, bytes=moved),
        "PolyNorm of order 3; slots and bytes are those of an element.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for *cells, slots, bytes_moved, share in predictions(rows, choices, ("BFloat16Storage", "FloatStorage")):
        lines.append(f"| {' | '.join(map(str, cells))} | {slots:.1f} | {bytes_moved} | {share:.2f} |")
    path.write_text("\n".join(lines) + "\n")


def main() -> int:
    """Measure everything, then write the table and the model's page."""
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels and tabulate what they take.")
    parser.add_argument("--architectures", nargs="+", default=list(build.CUDA_ARCHITECTURES))
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--orders", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels", help="path without suffix")
    args = parser.parse_args()
    choices = Choices.find()
    kernels = [k for k in choices.kernels if k.storage in args.storages and k.order in args.orders]
    table = args.output.with_suffix(".csv")
    rows = {}
    if table.exists():  # what is not measured anew is kept, if it is still an instance
        known = {(row.architecture, row.kernel): row for row in read_csv(table)}
        rows = {key: row for key, row in known.items() if key[1] in choices.kernels}
    for row in measure(kernels, args.architectures):
        rows[row.architecture, row.kernel] = row
        write_csv(table, sorted(rows.values(), key=lambda row: (row.architecture, str(row.kernel))))
    write_markdown(args.output.with_suffix(".md"), list(rows.values()), choices)
    return 0


if __name__ == "__main__":
    sys.exit(main())
