"""What of checks.py is about numbers: operations against their definitions in float64, and FP8 to the bit.

Beside the checks, what all of them are made of: calls by arguments with names, and errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from polycom_ext import functional, reference
from polycom_ext.ops.polynomial import fused as operations
from polycom_ext.ops.polynomial import library, quantized
from polycom_ext.ops.polynomial.inputs import Inputs

CPU = torch.device("cpu")
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
MANY = {"cuda": 2**25, "cpu": 2**17}
"""Elements of so many rows that every block of a GPU has several."""
FORMATS: tuple[tuple[quantized.Recipe, dict[str, Any]], ...] = (
    (quantized.Recipe.TENSOR, {}),
    (quantized.Recipe.BLOCKS, {}),
    (quantized.Recipe.BLOCKS, {"power_of_two": False, "epsilon": 0.01}),
    (quantized.Recipe.MX, {}),
    (quantized.Recipe.MX, {"swizzled": True}),
)
"""FP8 recipes, and their options."""


class Skip(Exception):
    """The check cannot be made here, for this reason."""


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
    setting: Setting,
    rows: int,
    width: int,
    order: int,
    dtype: torch.dtype,
    variant: str,
    seed: int = 0,
    drawn_on: torch.device = CPU,
) -> dict[str, Tensor]:
    """Arguments of a public function, by name; those of a variant as it takes them.

    Drawn on the CPU they are the same numbers on every device; many are drawn where they are used.
    """
    generator = torch.Generator(drawn_on).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=drawn_on).to(setting.device, dtype)

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


def _not_fused(setting: Setting) -> str:
    """Why nothing is fused there; nothing if it is."""
    if setting.device.type not in library.devices:
        return f"nothing is fused on {setting.device.type}: {library.problem or 'POLYCOM_OPS=eager'}"
    why = library.gpu_problem(setting.device.index or 0) if setting.device.type == "cuda" else ""
    return f"nothing is fused on {setting.device}: {why}" if why else ""


def _against_float64(
    setting: Setting, orders: tuple[int, ...], variants: tuple[str, ...], elements: int | None
) -> str:
    """Every function, type and kind of width; rows are few, or as many as make so many elements."""
    if why := _not_fused(setting):
        raise AssertionError(why)
    widths = SHORT_WIDTHS if setting.short else WIDTHS
    drawn_on = CPU if elements is None else setting.device
    wrong, worst, count = [], dict.fromkeys(TOLERANCE, 0.0), 0
    cases = product(FUNCTIONS, orders, TOLERANCE, widths, variants)
    for name, order, dtype, width, variant in cases:
        if width not in SHORT_WIDTHS and variant not in ("plain", "all"):
            continue  # between these two there is no other instance
        function, formula = FUNCTIONS[name]
        rows = 7 if elements is None else min(4099, max(7, elements // width))
        given = inputs(setting, rows, width, order, dtype, variant, width, drawn_on)
        grad = inputs(setting, rows, width, order, dtype, "plain", width + 1, drawn_on)["x"]
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
                case = f"{name}-{order} {dtype} {rows} rows of width {width} {variant}"
                wrong.append(f"{case}: {what} is off by {off:.1e}")
    if wrong:
        raise AssertionError(f"{len(wrong)} wrong: {'; '.join(wrong[:5])}")
    told = ", ".join(f"{str(dtype).removeprefix('torch.')} {off:.1e}" for dtype, off in worst.items())
    return f"{count} cases; largest error of y and the gradient of x: {told}"


def instances(setting: Setting) -> str:
    """Every function, order, type, kind of width and variant, of few rows."""
    return _against_float64(setting, ORDERS, VARIANTS, None)


def many_rows(setting: Setting) -> str:
    """Blocks that have several rows, one after the other, and sum over them."""
    elements = MANY["cpu" if setting.short else setting.device.type]
    return _against_float64(setting, (3,), ("plain", "all"), elements)


def sharded_rows(setting: Setting) -> str:
    """What two ranks of a tensor-parallel group do with halves of a row; the sums are added here."""
    if why := _not_fused(setting):
        raise AssertionError(why)
    for dtype, width in product(TOLERANCE, (74, 2048, 16512)):
        given = inputs(setting, 7, width, 3, dtype, "plain")
        grad = inputs(setting, 7, width, 3, dtype, "plain", seed=1)["x"]
        right = differentiated(lambda g: expected(reference.poly_norm, g), given, grad)
        halves = [Inputs(x.contiguous(), given["weight"], given["bias"]) for x in given["x"].chunk(2, dim=1)]
        grads = [one.contiguous() for one in grad.chunk(2, dim=1)]
        sums = sum(torch.ops.polycom.polynomial_sums(*half) for half in halves)
        parts = [torch.ops.polycom.polynomial_from_sums(*half, sums, width) for half in halves]
        of_parts = list(zip(halves, grads, (scales for _, scales in parts), strict=True))
        dots = sum(torch.ops.polycom.polynomial_backward_sums(*half, g, s) for half, g, s in of_parts)
        backward = torch.ops.polycom.polynomial_backward_from_sums
        got = {
            "y": torch.cat([y for y, _ in parts], dim=1),
            "gradient of x": torch.cat(
                [backward(*half, g, s, dots, width) for half, g, s in of_parts], dim=1
            ),
        }
        for name, one in got.items():
            if (off := error(one, right[name])) > TOLERANCE[dtype]:
                raise AssertionError(f"{dtype} width {width}: {name} is off by {off:.1e}")
    return "three types, three widths, in two halves"


def eight_bits(setting: Setting) -> str:
    """Bytes, scales and largest |y| are to the bit what plain operations on a CPU make of y."""
    served: dict[bool, set[str]] = {True: set(), False: set()}
    for (recipe, options), width, (rho, normalize) in product(
        FORMATS, (96, 2080) if setting.short else (96, 2080, 8256, 16416), ((0, True), (1, False), (1, True))
    ):
        rows = 7 if setting.short else 1031
        given = inputs(setting, rows, width, 3, torch.bfloat16, "experts")
        given["x"][1, 3], given["x"][2, width // 2] = torch.nan, torch.inf
        tensors = (*(given[name] for name in ("x", "weight", "bias")), None, None, given["offsets"])
        of_y = Inputs.of(tensors, (rho, normalize, 1e-6))
        target, wanted = (_target(recipe, rows, width, options, device) for device in (setting.device, CPU))
        served[not quantized.problem(of_y, target)].add(recipe.name)
        quantized.forward(of_y, target)
        wanted.scale_inv.zero_()  # the padding
        quantized.quantize(operations.forward(of_y)[0].cpu(), wanted)
        for name in ("data", "scale_inv", "amax"):
            got, right = getattr(target, name), getattr(wanted, name)
            if right is not None and not torch.equal(got.cpu(), right):
                case = f"{recipe.name} {options}, rho {rho}, normalize {normalize}, width {width}"
                raise AssertionError(f"{case}: {name} differs at {int((got.cpu() != right).sum())} places")
    told = [
        f"{', '.join(sorted(names))} {how}"
        for names, how in (
            (served[True], "in the kernel"),
            (served[False] - served[True], "by plain operations"),
        )
        if names
    ]
    return f"the same bits: {'; '.join(told)}"


def _target(
    recipe: quantized.Recipe, rows: int, width: int, options: dict[str, Any], device: torch.device
) -> quantized.Target:
    kind = torch.uint8 if recipe == quantized.Recipe.MX else torch.float32
    data = torch.full((rows, width), 99, dtype=torch.uint8, device=device)
    inverses = torch.full(quantized.scale_shape(recipe, rows, width), 77, dtype=kind, device=device)
    if recipe == quantized.Recipe.TENSOR:
        scale, amax = (torch.tensor([value], device=device) for value in (37.3, 0.5))
        options = {**options, "scale": scale, "amax": amax}
    return quantized.Target(recipe, data, inverses, **options)
