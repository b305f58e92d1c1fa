"""What an activation adds to a feed-forward network and to a block, at equal parameters: time and memory.

    python benchmarks/overhead.py          # on the GPU if there is one, of the paper's width, else on the CPU
    python benchmarks/overhead.py --repetitions 15 --output benchmarks/results/DATE-cpu-overhead

Sets ratios beside what the paper says in words (section 4.4): its activations gain "without significantly
increasing model size or complexity", and a higher order "can lead to computational overhead".

The floor is the same network with nothing between its linear layers. Cases: `relu`, `gelu` and `swiglu` (2/3
of the width, twice) of plain torch; ours as they dispatch, of several orders; ours in plain operations
(`eager`); the paper's formula under activation checkpointing, as the authors released it (`authors`); and
PolyNorm with the linear layer behind it as one function, which keeps one wide tensor (`recomputing`). Modes:
`ffn`; `ffn, recomputed`, all of it under checkpointing; `block`, with norms and attention. Forward and
backward through autograd; the cases take turns.

Time: on a CPU the process's processor time, which what else runs disturbs less than the clock; by events on a
GPU. `kept` is what forward leaves in memory for backward, beside the network's input, its result and its
parameters; `peak` the most at a time, gradients included. On a GPU the allocator counts them, on a CPU the
storages of all results of operations that are alive. Writes OUTPUT.csv and OUTPUT.md. MALLOC_… as in
activations.py.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import activations as speed
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import polycom_ext
from polycom_ext import activations
from polycom_ext.ops.polynomial import eager, library

MODES = ("ffn", "ffn, recomputed", "block")
FLOOR = "none"
PLAIN = ("relu", "gelu", "swiglu", "polyrelu-2", "polyrelu", "polyrelu-4", "polynorm", "polynorm-4")
OTHER_WAYS = ("polyrelu, eager", "polynorm, eager", "polynorm, authors", "polynorm, recomputing")
CASES = (FLOOR, *PLAIN, *OTHER_WAYS)
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One case; ratios are to the floor."""

    case: str
    mode: str
    dtype: str
    parameters: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    time_ratio: float
    """By p20."""
    kept_mib: float
    kept_ratio: float
    peak_mib: float


def operations(activation: str) -> int | None:
    """Multiplications and additions of an element forward; None where the formula has others."""
    name, _, order = activation.partition("-")
    r = int(order or activations.DEFAULT_ORDER)
    return {"polyrelu": 2 * r + 1, "polynorm": 5 * r - 1}.get(name)


class Eager(nn.Module):
    """Ours in plain operations."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return eager.polynomial(self.module.inputs(x))


def activation(case: str, like: Tensor) -> nn.Module:
    """The one of a case, its coefficients float32 as in training."""
    name, _, how = case.partition(", ")
    if case == FLOOR:
        return nn.Identity()
    if how == "authors":
        return speed.Polynomial(speed.authors, like.device, like.dtype)
    module = activations.build(name, device=like.device)
    return Eager(module) if how == "eager" else module


class Block(nn.Module):
    """A pre-norm block; heads of 64."""

    def __init__(self, ffn: nn.Module, x: Tensor) -> None:
        super().__init__()
        hidden, made = x.shape[-1], dict[str, Any](device=x.device, dtype=x.dtype)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, **made) for _ in range(2))
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False, **made)
        self.out = nn.Linear(hidden, hidden, bias=False, **made)
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.qkv(self.norms[0](x)).unflatten(-1, (3, -1, 64)).movedim(-3, 0).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(
            queries.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), is_causal=True
        )
        x = x + self.out(attended.transpose(0, 1).flatten(1))
        return x + self.ffn(self.norms[1](x))


class Recomputed(nn.Module):
    """Keeps its input alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.module, x, use_reentrant=False)
        return result


def network(case: str, mode: str, x: Tensor, width: int) -> nn.Module:
    """Of (tokens, hidden) numbers."""
    made = activation(case, x)
    inner = speed.swiglu_width(width) if case == "swiglu" else width
    ffn = (speed.RecomputingBlock if case.endswith("recomputing") else speed.Block)(made, inner, x)
    if mode == "block":
        return Block(ffn, x)
    return Recomputed(ffn) if mode == "ffn, recomputed" else ffn


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations have made and somebody still holds."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self._before = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in before}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                held = StorageWeakRef(storage)
                if held.cdata not in self._before:
                    self._made[held.cdata] = (held, storage.nbytes())
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        self._made = {key: one for key, one in self._made.items() if not one[0].expired()}
        return sum(size for _, size in self._made.values())


def memory(module: nn.Module, x: Tensor, grad: Tensor, device: torch.device) -> tuple[int, int]:
    """Bytes (kept, at most) of a step whose gradients are not there yet."""
    module.zero_grad(set_to_none=True)
    x.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        y = module(x)
        kept = torch.cuda.memory_allocated(device) - before - y.nbytes
        y.backward(grad)
        return kept, torch.cuda.max_memory_allocated(device) - before
    with Alive([*module.parameters(), x, grad]) as alive:
        y = module(x)
        kept = alive.now() - y.nbytes
        y.backward(grad)
    return kept, alive.peak


def milliseconds(device: torch.device, run: Callable[[], object]) -> float:
    """Of one call, the GPU's where there is one."""
    if device.type == "cuda":
        return speed.on_gpu(device, run)[0]
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1e3


def measure(args: argparse.Namespace, mode: str, dtype: str) -> list[Row]:
    """Every case in this mode, taking turns; a first turn is not counted."""
    device = torch.device(args.device)
    x = torch.randn(args.tokens, args.hidden, device=device, dtype=speed.DTYPES[dtype]).requires_grad_()
    grad = torch.randn_like(x)
    networks = {case: network(case, mode, x, args.width) for case in CASES}
    times: dict[str, list[float]] = {case: [] for case in CASES}
    bytes_of = {}
    for turn in range(args.repetitions + 1):
        shift = turn % len(CASES)
        for case in CASES[shift:] + CASES[:shift]:
            module = networks[case]
            module.zero_grad()
            x.grad = None
            took = milliseconds(device, lambda module=module: module(x).backward(grad))  # type: ignore[misc]
            if turn:
                times[case].append(took)
    for case in CASES:
        bytes_of[case] = memory(networks[case], x, grad, device)
        networks[case].zero_grad()
    tenths = {case: statistics.quantiles(taken, n=10, method="inclusive") for case, taken in times.items()}
    return [
        Row(
            case=case,
            mode=mode,
            dtype=dtype,
            parameters=sum(parameter.numel() for parameter in networks[case].parameters()),
            p20_ms=tenths[case][1],
            p50_ms=tenths[case][4],
            p80_ms=tenths[case][7],
            time_ratio=tenths[case][1] / tenths[FLOOR][1],
            kept_mib=bytes_of[case][0] / MIB,
            kept_ratio=bytes_of[case][0] / bytes_of[FLOOR][0] if bytes_of[FLOOR][0] else 1.0,
            peak_mib=bytes_of[case][1] / MIB,
        )
        for case in CASES
    ]


def write(args: argparse.Namespace, rows: list[Row]) -> None:
    """What was measured so far."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    args.output.with_suffix(".md").write_text(page(args, rows))


def page(args: argparse.Namespace, rows: list[Row]) -> str:
    """Conditions, the paper's words beside ratios, and the table."""
    device = torch.device(args.device)
    fused = f"fused on {', '.join(sorted(library.devices))}" if library.devices else "eager"
    kept = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, polycom-ext "
    sizes = f"{args.tokens} tokens, hidden {args.hidden}, width {args.width}"
    unit = "milliseconds" if device.type == "cuda" else "milliseconds of processor time"
    linear = 4 * args.hidden
    counted = [(name, operations(name)) for name in PLAIN]
    shares = [f"{name} {count} ({count / linear:.2%})" for name, count in counted if count]
    lines = [
        f"# What an activation adds, on {speed.machine(device)}",
        "",
        f"{datetime.date.today()}, {versions}{polycom_ext.__version__} ({fused}), load average "
        f"{os.getloadavg()[0]:.1f} at the end. {sizes} ({speed.swiglu_width(args.width)} gated). Forward and "
        f"backward, {unit}, p20 (p50, p80) of {args.repetitions} turns; ratios to the network with nothing "
        "between its linear layers, of times by p20.",
        "",
        f"    {' '.join([*kept, shlex.join(['python', *sys.argv])])}",
        "",
        'The paper, section 4.4: "without significantly increasing model size or complexity"; of a higher '
        f'order, "computational overhead". Forward, the linear layers take 4 x hidden = {linear} operations '
        f"for an element of the width; {', '.join(shares)}.",
        "",
        "| mode | type | case | parameters | time | time ratio | kept MiB | kept ratio | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = f"{row.p20_ms:.2f} ({row.p50_ms:.2f}, {row.p80_ms:.2f}) | {row.time_ratio:.2f}"
        held = f"{row.kept_mib:.2f} | {row.kept_ratio:.2f} | {row.peak_mib:.1f}"
        lines.append(f"| {row.mode} | {row.dtype} | {row.case} | {row.parameters} | {times} | {held} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure; the table is written after each mode."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="What an activation adds to a network.")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--tokens", type=int, help="default: 8192 on a GPU, 1024 on a CPU")
    parser.add_argument("--hidden", type=int, help="default: 2048 on a GPU, 512 on a CPU")
    parser.add_argument("--width", type=int, help="default: 8256 on a GPU, 2064 on a CPU")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtypes", nargs="+", choices=speed.DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--output", type=Path, default=Path("overhead"), help="path without suffix")
    args = parser.parse_args()
    on_gpu = torch.device(args.device).type == "cuda"
    args.tokens = args.tokens or (8192 if on_gpu else 1024)
    args.hidden = args.hidden or (2048 if on_gpu else 512)
    args.width = args.width or (8256 if on_gpu else 2064)
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    for dtype in args.dtypes:
        for mode in args.modes:
            rows += measure(args, mode, dtype)
            write(args, rows)
    print(args.output.with_suffix(".md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
