"""Speed and memory of the activations, by themselves and within a feed-forward block.

    python benchmarks/activations.py          # on the GPU if there is one, else on the CPU
    python benchmarks/activations.py --threads 2 --widths 1536 8256 --output benchmarks/results/DATE-cpu

Providers: `polycom` (this package as it dispatches), `eager` (its plain torch path), `authors` (the formula
of the paper as plain operations under activation checkpointing, as the released code runs it), `compiled`
(torch.compile of that formula, of each shape anew), `gelu`, `swiglu` (2/3 of the width, twice: equal
parameters) and, where it is installed and there is a GPU, `liger` (PyPI liger-kernel). One that fails is
told, and the others go on; the exit status is 1 if it is `polycom`.

Writes OUTPUT.csv (one row a provider, width, type and mode: p20, p50, p80 of the time, bytes moved per second
as a share of what a copy of the tensor reached in the same run, peak memory), OUTPUT.md and OUTPUT.png. The
bytes are those that the operation cannot avoid: x and y forward; x, the gradient of y and that of x backward.
On a GPU the time is the GPU's alone, which waits until the processor has asked for all of a call; what asking
takes is told beside it, and counts where a model keeps its GPU waiting.
Mode `block` is forward and backward of linear, activation, linear; `block, recomputing` the same where
backward recomputes the activation instead of keeping it.

Providers take turns, in rounds that each begin with another one: a machine's mood, and the state of its
allocator, then meets them all alike.
On a CPU, fresh outputs cost page faults, for every provider. MALLOC_MMAP_MAX_=0 and
MALLOC_TRIM_THRESHOLD_=68719476736 in the environment make glibc keep its pages, as if outputs were given.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import polycom_ext
from polycom_ext import functional
from polycom_ext.machine.processor import processor
from polycom_ext.modules import SwiGLU
from polycom_ext.ops.polynomial import eager, library
from polycom_ext.ops.polynomial.inputs import Inputs

WIDTHS = (1024, 1536, 2048, 4096, 8192, 8256, 16384, 32768)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HIDDEN = 2048
"""Of the feed-forward block; the paper's."""
FLUSHED = 256 * 2**20
"""Bytes that are written between the calls on a GPU: more than its cache holds."""
AHEAD = 4_000_000
"""Cycles for which a GPU waits before a call, some two milliseconds."""
LEAST_REPETITIONS = 3
"""Of a measurement that takes longer than it may."""


@dataclass(frozen=True)
class Row:
    """One measurement; times in milliseconds."""

    provider: str
    mode: str
    dtype: str
    rows: int
    width: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    asked_ms: float | None
    share_of_copy: float | None
    peak_mib: float | None


@dataclass
class Sample:
    """Times of one provider's mode, in milliseconds; `moved` bytes cannot be avoided."""

    provider: str
    mode: str
    times: list[float]
    asked: list[float]
    """Of the processor, for a GPU; else nothing."""
    moved: int | None = None
    peak_mib: float | None = None

    def quantile(self, tenths: int) -> float:
        return quantile(self.times, tenths)


def quantile(times: list[float], tenths: int) -> float:
    return statistics.quantiles(times, n=10, method="inclusive")[tenths - 1]


def _formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    def normalized(v: Tensor) -> Tensor:
        return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)

    return weight[0] * normalized(x**3) + weight[1] * normalized(x**2) + weight[2] * normalized(x) + bias


class Polynomial(nn.Module):
    """A function of (x, weight, bias) with the coefficients as parameters."""

    def __init__(self, function: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.full((3,), 1 / 3, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return eager.polynomial(Inputs(x, weight, bias))


def authors(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return checkpoint(_formula, x, weight, bias, use_reentrant=False)


def _liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.poly_norm import LigerPolyNormFunction

    return LigerPolyNormFunction.apply(x, weight, bias.squeeze(0), 1e-6)  # its bias has no dimension


def providers(names: list[str], device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
    """(name, activation) of those asked for that can run here, coefficients in each provider's own type."""
    functions: dict[str, tuple[Callable[..., Tensor], torch.dtype]] = {
        "polycom": (functional.poly_norm, torch.float32),
        "eager": (_eager, torch.float32),
        "authors": (authors, dtype),
        "liger": (_liger, dtype),
    }
    if "compiled" in names:  # whose import takes seconds
        functions["compiled"] = (torch.compile(_formula, dynamic=False), dtype)
    modules = {"gelu": nn.GELU(), "swiglu": SwiGLU()}
    for name in names:
        if missing := _missing(name, device):
            print(f"{name}: skipped ({missing})", file=sys.stderr)
            continue
        if name in functions:
            function, parameters = functions[name]
            yield name, Polynomial(function, device, parameters)
        else:
            yield name, modules[name]


@cache
def _missing(name: str, device: torch.device) -> str:
    """Why a provider cannot run here; nothing if it can."""
    if name == "liger" and (device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None):
        return "needs a GPU and `pip install liger-kernel`"
    try:
        if name == "liger":
            import_module("liger_kernel.ops.poly_norm")
        if name == "compiled":
            torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # of the compiler, or of a package below it
        return _reason(error)
    return ""


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split(chr(10))[:2])}"


def on_gpu(device: torch.device, run: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of a call on the GPU, and of the processor to ask for it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    start = time.perf_counter()
    begin.record()
    run()
    end.record()
    asked = (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)), asked


class Timer:
    """Milliseconds of a call: the GPU's, its cache flushed before, and those of asking; else the clock's."""

    def __init__(self, device: torch.device, repetitions: int, seconds: float) -> None:
        self.device, self.repetitions, self.seconds = device, repetitions, seconds
        flush = FLUSHED if device.type == "cuda" else 0
        self._flush = torch.empty(flush, dtype=torch.int8, device=device)

    def __call__(
        self, run: Callable[[], object], prepare: Callable[[], object] = lambda: None
    ) -> tuple[list[float], list[float]]:
        for _ in range(3):
            prepare()
            run()
        times: list[float] = []
        asked: list[float] = []
        begin = time.monotonic()
        while len(times) < self.repetitions:
            if len(times) >= LEAST_REPETITIONS and time.monotonic() - begin > self.seconds:
                break
            prepare()
            if self.device.type == "cuda":
                self._flush.zero_()
                took, processors = on_gpu(self.device, run)
                asked.append(processors)
            else:
                start = time.perf_counter()
                run()
                took = (time.perf_counter() - start) * 1e3
            times.append(took)
        return times, asked


def _peak_mib(device: torch.device, run: Callable[[], object]) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _sample_copy(x: Tensor, timer: Timer) -> Sample:
    out = torch.empty_like(x)
    return Sample("copy", "forward", *timer(partial(out.copy_, x)), 2 * x.numel() * x.element_size())


def _sample_activation(name: str, activation: nn.Module, x: Tensor, timer: Timer) -> Iterator[Sample]:
    """Forward, backward and both together through autograd."""
    gated = isinstance(activation, SwiGLU)
    inputs = x.detach().requires_grad_()
    y = activation(inputs)
    grad = torch.randn_like(y)
    given = grad.clone() if name == "liger" else grad  # its backward writes its result into it
    size = x.element_size()
    moved = {"forward": (x.numel() + y.numel()) * size, "backward": (2 * x.numel() + y.numel()) * size}
    moved["both"] = moved["forward"] + moved["backward"]
    assert gated or y.shape == x.shape

    def clear() -> None:
        inputs.grad = None
        activation.zero_grad()
        if given is not grad:
            grad.copy_(given)

    def forward() -> Tensor:
        return activation(inputs)

    def both() -> None:
        activation(inputs).backward(grad)

    def clear_and_forward() -> None:
        nonlocal y
        clear()
        y = activation(inputs)

    def backward() -> None:
        y.backward(grad)

    modes = (("forward", forward, clear), ("backward", backward, clear_and_forward), ("both", both, clear))
    for mode, run, prepare in modes:
        times = timer(run, prepare)
        prepare()
        yield Sample(name, mode, *times, moved[mode], _peak_mib(timer.device, run))


class Block(nn.Module):
    """linear, activation, linear; the paper's FFN without biases."""

    def __init__(self, activation: nn.Module, width: int, x: Tensor) -> None:
        super().__init__()
        gated = isinstance(activation, SwiGLU)
        self.up = nn.Linear(x.shape[-1], 2 * width if gated else width, False, x.device, x.dtype)
        self.activation = activation
        self.down = nn.Linear(width, x.shape[-1], False, x.device, x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class RecomputingBlock(Block):
    """The same with PolyNorm as `poly_norm_linear`, which does not keep the activation's result."""

    activation: Polynomial

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.activation.weight, self.activation.bias
        return functional.poly_norm_linear(self.up(x), weight, bias, self.down.weight)


def _sample_blocks(name: str, activation: nn.Module, x: Tensor, width: int, timer: Timer) -> Iterator[Sample]:
    inner = swiglu_width(width) if isinstance(activation, SwiGLU) else width
    yield _sample_block(name, "block", Block(activation, inner, x), x, timer)
    if name == "polycom":
        block = RecomputingBlock(activation, inner, x)
        yield _sample_block(name, "block, recomputing", block, x, timer)


def _sample_block(name: str, mode: str, block: Block, x: Tensor, timer: Timer) -> Sample:
    inputs = x.detach().requires_grad_()
    grad = torch.randn_like(x)

    def clear() -> None:
        inputs.grad = None
        block.zero_grad()

    def run() -> None:
        block(inputs).backward(grad)

    times = timer(run, clear)
    clear()
    return Sample(name, mode, *times, peak_mib=_peak_mib(timer.device, run))


def swiglu_width(width: int) -> int:
    """Two thirds, to a multiple of 8: equal parameters."""
    return round(width * 2 / 3 / 8) * 8


@dataclass(frozen=True)
class Failure:
    """What a provider could not do."""

    provider: str
    dtype: str
    width: int
    reason: str


def _turn(
    args: argparse.Namespace, x: Tensor, name: str, activation: nn.Module, timer: Timer
) -> Iterator[Sample]:
    """A provider's."""
    width = x.shape[1]
    print(f"{x.dtype} {args.rows} x {width} {name}", file=sys.stderr)
    inputs = x if name != "swiglu" else x.new_empty(args.rows, 2 * swiglu_width(width)).normal_()
    yield from _sample_activation(name, activation, inputs, timer)
    if args.block and x.dtype == torch.bfloat16:
        hidden = x.new_empty(args.rows, args.hidden).normal_()
        yield from _sample_blocks(name, activation, hidden, width, timer)


def _shape(
    args: argparse.Namespace, dtype_name: str, width: int, device: torch.device, timer: Timer
) -> Iterator[Sample | Failure]:
    """Every provider's samples, in rounds; none of a provider after a failure."""
    if "compiled" in args.providers:
        torch.compiler.reset()  # else what is compiled for a second width is compiled for any, and slower
    dtype = DTYPES[dtype_name]
    x = torch.randn(args.rows, width, device=device, dtype=dtype)
    activations = list(providers(args.providers, device, dtype))
    failed: set[str] = set()
    for turn in range(args.rounds):
        shift = turn % max(len(activations), 1)
        yield _sample_copy(x, timer)
        for name, activation in activations[shift:] + activations[:shift]:
            if name in failed:
                continue
            try:
                yield from _turn(args, x, name, activation, timer)
            except Exception as error:  # too little memory, a compiler's, another version's
                failed.add(name)
                yield Failure(name, dtype_name, width, _reason(error))
            if name in failed and device.type == "cuda":
                torch.cuda.empty_cache()


def measure(args: argparse.Namespace, device: torch.device) -> Iterator[Row | Failure]:
    """Every row of the table, in order; progress goes to stderr."""
    timer = Timer(device, args.repetitions, args.seconds)
    for dtype_name in args.dtypes:
        for width in args.widths:
            samples: dict[tuple[str, str], Sample] = {}
            for found in _shape(args, dtype_name, width, device, timer):
                if isinstance(found, Failure):
                    yield found
                elif (known := samples.setdefault((found.provider, found.mode), found)) is not found:
                    known.times += found.times
                    known.asked += found.asked
            copy = samples["copy", "forward"]
            assert copy.moved is not None
            rate = copy.moved / copy.quantile(2)
            for sample in samples.values():
                yield Row(
                    sample.provider,
                    sample.mode,
                    dtype_name,
                    args.rows,
                    width,
                    sample.quantile(2),
                    sample.quantile(5),
                    sample.quantile(8),
                    quantile(sample.asked, 2) if sample.asked else None,
                    None if sample.moved is None else sample.moved / sample.quantile(2) / rate,
                    sample.peak_mib,
                )


def machine(device: torch.device) -> str:
    """The processor or GPU by name."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{processor()}, {torch.get_num_threads()} threads"


def _settings() -> list[str]:
    """What the environment says of allocation and threads, as it is written before a command."""
    prefixes = ("MALLOC_", "OMP_", "THP_", "POLYCOM_")
    return [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(prefixes)]


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line a row, with names of columns."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_markdown(path: Path, rows: list[Row], failures: list[Failure], device: torch.device) -> None:
    """The conditions, and the same numbers as tables."""
    operations = f"fused on {', '.join(sorted(library.devices))}" if library.devices else "eager"
    build = torch.ops.polycom.polynomial_build() if library.devices else "none"
    lines = [
        f"# Activations on {machine(device)}",
        "",
        f"{datetime.date.today().isoformat()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, "
        f"polycom-ext {polycom_ext.__version__} ({operations}; build {build}).",
        f"Command: `{shlex.join([*_settings(), 'python', *sys.argv])}`.",
        "Times in milliseconds: p20 (p50, p80). Share of copy: by p20, of the bytes that cannot be avoided. "
        "Asked: what the processor takes to ask a GPU for it.",
        *(f"Failed: {one.provider}, {one.dtype}, width {one.width}: {one.reason}" for one in failures),
        "",
        "| provider | mode | type | rows | width | time | share of copy | asked | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = "" if row.share_of_copy is None else f"{row.share_of_copy:.2f}"
        asked = "" if row.asked_ms is None else f"{row.asked_ms:.3f}"
        peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        times = f"{row.p20_ms:.3f} ({row.p50_ms:.3f}, {row.p80_ms:.3f})"
        cells = (row.provider, row.mode, row.dtype, row.rows, row.width, times, share, asked, peak)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    path.write_text("\n".join(lines) + "\n")


def plot(path: Path, rows: list[Row]) -> None:
    """Share of the copy's bandwidth against width, a panel a type and mode."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = sorted({row.dtype for row in rows})
    modes = ("forward", "backward", "both")
    figure, axes = pyplot.subplots(
        len(dtypes), 3, figsize=(12, 3.2 * len(dtypes)), squeeze=False, sharey=True, layout="constrained"
    )
    for dtype, line in zip(dtypes, axes, strict=True):
        for mode, axis in zip(modes, line, strict=True):
            for name in dict.fromkeys(row.provider for row in rows if row.provider != "copy"):
                own = [r for r in rows if (r.provider, r.mode, r.dtype) == (name, mode, dtype)]
                axis.plot([r.width for r in own], [r.share_of_copy for r in own], marker="o", label=name)
            axis.set(title=f"{mode}, {dtype}", xlabel="width")
            axis.set_xscale("log", base=2)
        line[0].set_ylabel("share of a copy's bandwidth")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=7)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, then write the three files."""
    names = ["polycom", "eager", "authors", "compiled", "gelu", "swiglu", "liger"]
    parser = argparse.ArgumentParser(description="Speed and memory of the activations.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, help="default: 16384 on a GPU, 2048 on a CPU")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--providers", nargs="+", choices=names, default=names)
    parser.add_argument("--block", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 only")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="hidden size of the feed-forward block")
    parser.add_argument("--repetitions", type=int, default=25, help="of a measurement, in every round")
    parser.add_argument("--rounds", type=int, default=3, help="that the providers take turns in")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="a measurement has fewer repetitions after so many"
    )
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--output", type=Path, default=Path("activations"), help="path without suffix")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    args.rows = args.rows or (16384 if device.type == "cuda" else 2048)
    if args.threads:
        torch.set_num_threads(args.threads)
    if device.type not in library.devices:
        print(f"warning: nothing is fused on {device.type}: {library.problem}", file=sys.stderr)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    failures: list[Failure] = []
    for found in measure(args, device):
        if isinstance(found, Failure):
            failures.append(found)
            print(f"{found.provider} failed: {found.reason}", file=sys.stderr)
            continue
        rows.append(found)
        write_csv(args.output.with_suffix(".csv"), rows)  # an interrupted run keeps what it measured
        write_markdown(args.output.with_suffix(".md"), rows, failures, device)
    plot(args.output.with_suffix(".png"), rows)
    return int(any(one.provider == "polycom" for one in failures))


if __name__ == "__main__":
    sys.exit(main())
