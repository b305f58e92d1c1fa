"""What must hold of the fused operations on a device, checked there; each check says how it went.

    python benchmarks/checks.py --output FILE.json [--device cpu] [--only WORD …] [--short] [--resume]

Every instance against its definition in float64, y in FP8 and sharded rows (numerics.py); then what only a
device can show: determinism, other streams, a second GPU, CUDA graphs, misaligned and huge tensors, NaN and
infinity; and Transformer Engine's path beside the plain one, where TE is installed. A check that cannot be
made here says why; one that breaks is a result too, and the others go on: by --resume, where it has ended its
process or left it without its GPU. On a CPU its operations are checked, and what is only a GPU's is left out.
--short takes one width of each kind. Exit status 1 if a check has failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from activations import on_gpu
from numerics import (
    TOLERANCE,
    Setting,
    Skip,
    differentiated,
    eight_bits,
    error,
    expected,
    fused,
    inputs,
    instances,
    many_rows,
    sharded_rows,
)
from torch import Tensor, nn

from polycom_ext import activations, functional, reference

HUGE = 2**31 + 2**20
"""Elements: their count, and the last ones' places, need more than 32 bits."""
TE_TOLERANCE = {"bf16": 2e-2, "fp8": 1.5e-1}
"""Ratio of norms of TE's result to the plain one's; FP8 rounds every product's operands to 3 bits."""


MOST_SECONDS = 60
"""Of a check: one that hangs on a GPU cannot be interrupted, but its process can be ended."""


@dataclass(frozen=True)
class Result:
    """One check."""

    check: str
    status: str = "not made"
    """Or `begun`, `passed`, `failed` or `skipped`."""
    text: str = ""
    seconds: float = 0.0


def _call(setting: Setting, rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """A call of PolyNorm, forward and backward, and its arguments."""
    given = inputs(setting, rows, width, 3, dtype, "plain")
    grad = inputs(setting, rows, width, 3, dtype, "plain", seed=1)["x"]

    def call(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return differentiated(lambda g: fused(functional.poly_norm, g), given, grad)

    return call, given


def _same(one: dict[str, Tensor], other: dict[str, Tensor], what: str) -> None:
    for name in one:
        if not torch.equal(one[name].cpu(), other[name].cpu()):
            raise AssertionError(f"{what}: {name} differs by {error(other[name].cpu(), one[name].cpu()):.1e}")


def determinism(setting: Setting) -> str:
    """The same call gives the same bits, coefficients' gradients included."""
    for width in (1536, 8256):
        call, given = _call(setting, 257 if setting.short else 4099, width)
        first = call(given)
        for _ in range(3):
            _same(first, call(given), f"width {width}")
    return "four calls, the same bits"


def streams(setting: Setting) -> str:
    """On a stream of its own, behind work that has not ended, the operations wait for their turn."""
    setting.on_gpu()
    call, given = _call(setting, 64 if setting.short else 4096, 8256)
    wanted = call(given)
    stream = torch.cuda.Stream(setting.device)
    stream.wait_stream(torch.cuda.current_stream(setting.device))
    with torch.cuda.stream(stream):
        late = {**given, "x": torch.zeros_like(given["x"])}
        torch.cuda._sleep(50_000_000)
        late["x"].copy_(given["x"])
        got = call(late)
    torch.cuda.synchronize(setting.device)
    _same(wanted, got, "on another stream")
    return "the same bits on a stream of its own"


def second_device(setting: Setting) -> str:
    """A call on another GPU than the current one."""
    setting.on_gpu()
    if torch.cuda.device_count() < 2:
        raise Skip("there is one GPU")
    call, given = _call(setting, 257, 8256)
    other = Setting(torch.device("cuda", 1), setting.short)
    call_there, _ = _call(other, 257, 8256)
    _same(call(given), call_there({name: one.to(other.device) for name, one in given.items()}), "on cuda:1")
    return "the same bits on cuda:1 while cuda:0 is current"


def graphs(setting: Setting) -> str:
    """A captured forward and backward, replayed on other values."""
    setting.on_gpu()
    rows = 64 if setting.short else 1024
    call, given = _call(setting, rows, 8256)
    stream = torch.cuda.Stream(setting.device)
    stream.wait_stream(torch.cuda.current_stream(setting.device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(given)
    torch.cuda.current_stream(setting.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(given)
    given["x"].copy_(inputs(setting, rows, 8256, 3, torch.bfloat16, "plain", seed=2)["x"])
    graph.replay()
    torch.cuda.synchronize(setting.device)
    _same(call(given), captured, "replayed")
    return "a replay on other values has the bits of a call"


def misaligned(setting: Setting) -> str:
    """Rows that begin at no multiple of a vector, of x and of the gradient."""
    for dtype, width in product(TOLERANCE, (1024, 1536, 8256)):
        x, grad = (
            inputs(setting, 1, 5 * width + 1, 3, dtype, "plain", seed)["x"][0, 1:].view(5, width)
            for seed in (1, 2)
        )
        assert x.data_ptr() % 16
        given = inputs(setting, 5, width, 3, dtype, "plain")
        leaf = x.detach().requires_grad_()  # no copy: that would be aligned
        y = functional.poly_norm(leaf, given["weight"], given["bias"])
        (grad_x,) = torch.autograd.grad(y, leaf, grad)
        right = differentiated(lambda g: expected(reference.poly_norm, g), {**given, "x": x}, grad)
        for name, one in (("y", y), ("gradient of x", grad_x)):
            if (off := error(one, right[name])) > TOLERANCE[dtype]:
                raise AssertionError(f"{dtype} width {width}: {name} is off by {off:.1e}")
    return "three types, three widths"


def huge(setting: Setting) -> str:
    """More elements than 32 bits count: the first and the last rows are those of a small call."""
    width = 8192
    rows = 9 if setting.short else HUGE // width
    if setting.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(setting.device)
        needed = 5 * 2 * rows * width
        if free < needed:
            raise Skip(f"needs {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free")
    elif not setting.short:
        raise Skip("takes a CPU minutes")
    given = inputs(setting, 4, width, 3, torch.bfloat16, "plain")
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=setting.device)
    x[:2], x[-2:] = given["x"][:2], given["x"][2:]
    ends = [0, 1, rows - 2, rows - 1]
    leaf = x.requires_grad_()
    y = functional.poly_norm(leaf, given["weight"], given["bias"])
    (grad_x,) = torch.autograd.grad(y, leaf, y)
    small = given["x"].clone().requires_grad_()
    small_y = functional.poly_norm(small, given["weight"], given["bias"])
    (small_grad,) = torch.autograd.grad(small_y, small, small_y)
    _same({"y": small_y, "gradient of x": small_grad}, {"y": y[ends], "gradient of x": grad_x[ends]}, "huge")
    return f"{rows} rows of {width}: {rows * width / 2**31:.2f} times 2^31 elements"


def not_numbers(setting: Setting) -> str:
    """A NaN or an infinity shows in its row, and nowhere else."""
    for value, width in product((float("nan"), float("inf"), -float("inf")), (37, 1536, 8256, 16388)):
        given = inputs(setting, 5, width, 3, torch.bfloat16, "plain")
        given["x"][2, width // 2] = value
        y = functional.poly_norm(given["x"], given["weight"], given["bias"])
        finite = y.isfinite().all(dim=1).tolist()
        if finite != [True, True, False, True, True]:
            raise AssertionError(f"{value} in row 2 of width {width}: finite rows {finite}")
    return "NaN and both infinities, four widths"


def no_rows(setting: Setting) -> str:
    """An expert that got no token."""
    call, given = _call(setting, 0, 1536)
    found = call(given)
    if any(found[name].count_nonzero() for name in found):
        raise AssertionError("a gradient of nothing is not zero")
    return "no rows: no result, zero gradients"


def _te_block(setting: Setting, activation: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A feed-forward block on TE's operations, and the plain one of the same parameters."""
    import transformer_engine.pytorch as te

    from polycom_ext.integrations.transformer_engine import operation_of

    hidden, width = (128, 256) if setting.short else (2048, 8192)
    about: dict[str, Any] = {"device": setting.device, "dtype": torch.bfloat16}
    plain = nn.Sequential(
        nn.Linear(hidden, width, bias=False, **about),
        activation,
        nn.Linear(width, hidden, bias=False, **about),
    )
    block = te.ops.Sequential(
        te.ops.Linear(hidden, width, bias=False, **about),
        operation_of(activation),
        te.ops.Linear(width, hidden, bias=False, **about),
    )
    with torch.no_grad():
        for there, here in ((block[0], plain[0]), (block[2], plain[2])):
            there.weight.copy_(here.weight)
    return block, plain


def transformer_engine(setting: Setting, recipe: str) -> str:
    """TE's path beside the plain one: results, gradients of x, and time."""
    setting.on_gpu()
    try:
        import transformer_engine.pytorch as te
    except Exception as problem:  # a library of its own that is missing raises OSError, or others
        raise Skip(f"Transformer Engine cannot be imported: {problem}") from None
    if recipe == "fp8" and torch.cuda.get_device_capability(setting.device) < (8, 9):
        raise Skip("this GPU has no FP8")
    activation = activations.build("polynorm", device=setting.device)
    block, plain = _te_block(setting, activation)
    autocast = getattr(te, "autocast", None) or te.fp8_autocast
    x = torch.randn(4096, plain[0].in_features, device=setting.device, dtype=torch.bfloat16)  # type: ignore[index]

    def run(module: nn.Module) -> dict[str, Tensor]:
        leaf = x.detach().requires_grad_()
        with autocast(enabled=recipe == "fp8" and module is block):
            y = module(leaf)
        return {"y": y.detach(), "gradient of x": torch.autograd.grad(y, leaf, x)[0]}

    for _ in range(3):  # delayed scaling learns its scales
        got = run(block)
    right = run(plain)
    found = {name: error(got[name], right[name]) for name in got}
    if wrong := {name: off for name, off in found.items() if off > TE_TOLERANCE[recipe]}:
        raise AssertionError(", ".join(f"{name} is off by {off:.1e}" for name, off in wrong.items()))
    told = [f"{name} differs by {off:.1e}" for name, off in found.items()]
    times = [
        f"{title} {_milliseconds(setting.device, run, one):.2f} ms"
        for title, one in (("TE", block), ("plain", plain))
    ]
    return ", ".join([*told, *times])


def _milliseconds(device: torch.device, run: Callable[[nn.Module], object], module: nn.Module) -> float:
    """The median of ten calls on a GPU."""
    return statistics.median(on_gpu(device, lambda: run(module))[0] for _ in range(10))


CHECKS: dict[str, Callable[[Setting], str]] = {
    "every instance against float64": instances,
    "many rows against float64": many_rows,
    "sharded rows": sharded_rows,
    "FP8": eight_bits,
    "determinism": determinism,
    "another stream": streams,
    "a second GPU": second_device,
    "CUDA graphs": graphs,
    "misaligned tensors": misaligned,
    "huge tensors": huge,
    "NaN and infinity": not_numbers,
    "no rows": no_rows,
    "Transformer Engine, bf16": lambda setting: transformer_engine(setting, "bf16"),
    "Transformer Engine, FP8": lambda setting: transformer_engine(setting, "fp8"),
}


def made(name: str, setting: Setting) -> Result:
    """A check's result, whatever becomes of it."""
    start = time.monotonic()
    try:
        status, text = "passed", CHECKS[name](setting)
    except Skip as reason:
        status, text = "skipped", str(reason)
    except AssertionError as failure:
        status, text = "failed", str(failure) or traceback.format_exc().strip().splitlines()[-2].strip()
    except Exception as failure:
        traceback.print_exc()
        said = str(failure).splitlines() or [""]
        status, text = "failed", f"{type(failure).__name__}: {said[0]}"
    return Result(name, status, text, time.monotonic() - start)


def make(results: list[Result], setting: Setting, tell: Callable[[list[Result]], None]) -> bool:
    """Make those not made yet, telling before and after each; False if another process must go on."""
    for at, before in enumerate(results):
        if before.status == "begun":
            results[at] = replace(before, status="failed", text="its process ended")
            tell(results)
        if before.status != "not made":
            continue
        results[at] = replace(before, status="begun")
        tell(results)
        faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
        results[at] = made(before.check, setting)
        faulthandler.cancel_dump_traceback_later()
        tell(results)
        if results[at].status == "failed" and not _works(setting.device):
            return False
    return True


def _works(device: torch.device) -> bool:
    """Whether this process still has the device: a kernel's fault takes a GPU from its process."""
    try:
        return bool(torch.ones(1, device=device).item())
    except RuntimeError:
        return False


def main() -> int:
    """Make the checks; at any time the file says of each how it stands."""
    parser = argparse.ArgumentParser(description="Check the fused operations on a device.")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", default=[""], help="checks with these in the name"
    )
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--resume", action="store_true", help="go on where a process before has ended")
    args = parser.parse_args()
    faulthandler.enable()
    names = [name for name in CHECKS if any(word in name for word in args.only)]
    results = [Result(name) for name in names]
    if args.resume:
        results = [Result(**one) for one in json.loads(args.output.read_text())]
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    known = {one.check: one for one in results}

    def tell(results: list[Result]) -> None:
        for one in results:
            if one != known[one.check] and one.status not in ("begun", "not made"):
                print(f"{one.check}: {one.status}, {one.text} ({one.seconds:.1f} s)", flush=True)
            known[one.check] = one
        text = json.dumps([asdict(one) for one in results], indent=1)
        partial = args.output.with_name(f".{args.output.name}")
        partial.write_text(text)
        partial.replace(args.output)

    ended = make(results, Setting(device, args.short), tell)
    return int(not ended or any(one.status == "failed" for one in results))


if __name__ == "__main__":
    sys.exit(main())
