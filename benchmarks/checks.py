"""What must hold of the fused operations on a device, checked there; each check says how it went.

    python benchmarks/checks.py --output FILE.json [--device cpu] [--only WORD …] [--short]

Every instance against its definition in float64, forward and backward; then what only a device can show:
determinism, other streams, a second GPU, CUDA graphs, misaligned and huge tensors, NaN and infinity; and
Transformer Engine's path beside the plain one, where TE is installed. A check that cannot be made here says
why; one that breaks is a result too, and the others go on. On a CPU its operations are checked, and what is
only a GPU's is left out. --short takes one width of each kind. Exit status 1 if a check has failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polycom_ext import activations, functional, reference
from polycom_ext.ops.polynomial import library

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""Ratio of norms, as stated for the results (design: precision)."""
COEFFICIENTS = 1e-4
"""The same of gradients that are sums over all rows, where terms cancel."""
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "poly_relu": (functional.poly_relu, lambda x, *of: reference.poly_relu(x.relu(), *of)),
    "poly_norm": (functional.poly_norm, reference.poly_norm),
    "poly_relu_norm": (functional.poly_relu_norm, lambda x, *of: reference.poly_norm(x.relu(), *of)),
}
"""With relu's derivative at 0, which is 0, and not that of the definitions' clamp: x + pre_bias is often 0 in
16 bits."""
ORDERS = (1, 2, 3, 4)
WIDTHS = (8, 37, 1001, 1024, 1536, 2056, 8192, 8256, 16384, 16388, 32768, 32776)
"""Each takes another instance in one of the types, or the last or first width of one."""
SHORT_WIDTHS = (37, 1024, 8256)
VARIANTS = ("plain", "pre_bias", "row_scale", "experts", "all")
HUGE = 2**31 + 2**20
"""Elements: their count, and the last ones' places, need more than 32 bits."""
TE_TOLERANCE = {"bf16": 2e-2, "fp8": 1.5e-1}
"""Ratio of norms of TE's result to the plain one's; FP8 rounds every product's operands to 3 bits."""


class Skip(Exception):
    """The check cannot be made here, for this reason."""


@dataclass(frozen=True)
class Result:
    """One check."""

    check: str
    status: str
    """`passed`, `failed` or `skipped`."""
    text: str
    seconds: float


@dataclass(frozen=True)
class Setting:
    """Where the checks are made, and how much of them."""

    device: torch.device
    short: bool

    def on_gpu(self) -> None:
        if self.device.type != "cuda":
            raise Skip("is about GPUs")


def error(actual: Tensor, expected: Tensor) -> float:
    """Ratio of norms; what is no number is infinitely wrong."""
    actual, expected = actual.detach().double(), expected.detach().double()
    found = float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
    return found if found == found else float("inf")


def inputs(
    setting: Setting, rows: int, width: int, order: int, dtype: torch.dtype, variant: str, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments of a public function, by name; those of a variant as it takes them.

    They are drawn on the CPU: the same numbers on every device.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(setting.device, dtype)

    experts = (3,) if variant in ("experts", "all") else ()
    given = {
        "x": normal(rows, width, dtype=dtype),
        "weight": normal(*experts, order),
        "bias": normal(*experts, 1),
    }
    if variant in ("pre_bias", "all"):
        given["pre_bias"] = normal(*experts, width, dtype=dtype)
    if variant in ("row_scale", "all"):
        given["row_scale"] = normal(rows)
    if experts:  # the second has no rows, the last ones are nobody's
        given["offsets"] = torch.tensor([rows // 2, rows // 2, rows - 1], device=setting.device)
    return given


def expected(formula: Callable[..., Tensor], given: dict[str, Tensor]) -> Tensor:
    """The definition in float64, variants spelled out."""
    x, weight, bias = given["x"].double(), given["weight"], given["bias"]
    pre_bias, row_scale = given.get("pre_bias"), given.get("row_scale")
    ends = [len(x)] if "offsets" not in given else given["offsets"].tolist()
    parts, start = [], 0
    for expert, end in enumerate(ends):
        of = (weight[expert], bias[expert]) if "offsets" in given else (weight, bias)
        u = x[start:end]
        if pre_bias is not None:
            u = u + (pre_bias[expert] if pre_bias.dim() == 2 else pre_bias).double()
        parts.append(formula(u, *of))
        start = end
    y = torch.cat([*parts, torch.zeros_like(x[start:])])
    return y if row_scale is None else y * row_scale.double()[:, None]


def differentiated(
    function: Callable[..., Tensor], given: dict[str, Tensor], grad: Tensor
) -> dict[str, Tensor]:
    """The result, and the gradient of every argument that has one."""
    leaves = {name: one.detach().clone() for name, one in given.items()}
    names = [name for name, one in leaves.items() if one.is_floating_point()]
    for name in names:
        leaves[name].requires_grad_()
    y = function(leaves)
    found = torch.autograd.grad(y, [leaves[name] for name in names], grad.to(y.dtype))
    return {"y": y.detach(), **{f"gradient of {name}": one for name, one in zip(names, found, strict=True)}}


def fused(function: Callable[..., Tensor], given: dict[str, Tensor]) -> Tensor:
    """The public function of arguments by name."""
    x, weight, bias, *rest = given
    return function(*(given[name] for name in (x, weight, bias)), **{name: given[name] for name in rest})


def instances(setting: Setting) -> str:
    """Every function, order, type, kind of width and variant."""
    if setting.device.type not in library.devices:
        raise AssertionError(f"nothing is fused on {setting.device.type}: {library.problem}")
    if setting.device.type == "cuda" and (why := library.gpu_problem(setting.device.index or 0)):
        raise AssertionError(f"nothing is fused on {setting.device}: {why}")
    widths = SHORT_WIDTHS if setting.short else WIDTHS
    wrong, worst, count = [], dict.fromkeys(TOLERANCE, 0.0), 0
    for name, order, dtype, width, variant in product(FUNCTIONS, ORDERS, TOLERANCE, widths, VARIANTS):
        function, formula = FUNCTIONS[name]
        given = inputs(setting, 7, width, order, dtype, variant, seed=width)
        grad = inputs(setting, 7, width, order, dtype, "plain", seed=width + 1)["x"]
        got = differentiated(lambda g, function=function: fused(function, g), given, grad)
        right = differentiated(lambda g, formula=formula: expected(formula, g), given, grad)
        count += 1
        for what in got:
            off = error(got[what], right[what])
            tensors = what in ("y", "gradient of x")
            if tensors:
                worst[dtype] = max(worst[dtype], off)
            # a sum of what is rounded, rounded again; terms cancel
            most = TOLERANCE[dtype] if tensors else max(COEFFICIENTS, 3 * TOLERANCE[given[what[12:]].dtype])
            if off > most:
                wrong.append(f"{name}-{order} {dtype} width {width} {variant}: {what} is off by {off:.1e}")
    if wrong:
        raise AssertionError(f"{len(wrong)} wrong: {'; '.join(wrong[:5])}")
    told = ", ".join(f"{str(dtype).removeprefix('torch.')} {off:.1e}" for dtype, off in worst.items())
    return f"{count} cases; largest error of y and the gradient of x: {told}"


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
    except ImportError as missing:
        raise Skip(f"Transformer Engine cannot be imported: {missing}") from None
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
    times = [f"{title} {_milliseconds(run, one):.2f} ms" for title, one in (("TE", block), ("plain", plain))]
    return ", ".join([*told, *times])


def _milliseconds(run: Callable[[nn.Module], object], module: nn.Module) -> float:
    """The median of ten calls on a GPU."""
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(module)
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)))
    return sorted(times)[5]


CHECKS: dict[str, Callable[[Setting], str]] = {
    "every instance against float64": instances,
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


def made(names: list[str], setting: Setting) -> Iterator[Result]:
    """Each check's result, whatever becomes of it."""
    for name in names:
        start = time.monotonic()
        try:
            status, text = "passed", CHECKS[name](setting)
        except Skip as reason:
            status, text = "skipped", str(reason)
        except AssertionError as failure:
            status, text = "failed", str(failure) or traceback.format_exc().strip().splitlines()[-2].strip()
        except Exception as failure:
            traceback.print_exc()
            status, text = (
                "failed",
                f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}",
            )
        yield Result(name, status, text, time.monotonic() - start)


def main() -> int:
    """Make the checks; after each one the file holds all so far."""
    parser = argparse.ArgumentParser(description="Check the fused operations on a device.")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", default=[""], help="checks with these in the name"
    )
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    names = [name for name in CHECKS if any(word in name for word in args.only)]
    results = []
    for result in made(names, Setting(torch.device(args.device), args.short)):
        print(f"{result.check}: {result.status}, {result.text} ({result.seconds:.1f} s)", flush=True)
        results.append(asdict(result))
        args.output.write_text(json.dumps(results, indent=1))
    return int(any(result["status"] == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
