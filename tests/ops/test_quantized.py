"""y in FP8: what the kernels write is to the byte what Transformer Engine's rules make of y."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from polycom_ext.ops.polynomial import dispatch, library
from polycom_ext.ops.polynomial.inputs import Inputs
from polycom_ext.ops.polynomial.quantized import (
    Recipe,
    Target,
    backward,
    forward,
    problem,
    quantize,
    scale_shape,
)

from .emulated import Emulator

needs_fused = pytest.mark.skipif("cpu" not in library.devices, reason=library.problem or "POLYCOM_OPS=eager")
RECIPES = [
    pytest.param(Recipe.TENSOR, {}, id="delayed"),
    pytest.param(Recipe.BLOCKS, {}, id="1x128"),
    pytest.param(Recipe.BLOCKS, {"power_of_two": False, "epsilon": 0.01}, id="1x128-any-scale"),
    pytest.param(Recipe.MX, {}, id="mxfp8"),
    pytest.param(Recipe.MX, {"swizzled": True}, id="mxfp8-swizzled"),
]
MEMBERS = [
    pytest.param(0, True, id="PolyNorm"),
    pytest.param(1, False, id="PolyReLU"),
    pytest.param(1, True, id="PolyReLUNorm"),
]


def _target(recipe: Recipe, rows: int, width: int, options: dict[str, Any]) -> Target:
    """Buffers full of rubbish."""
    kind = torch.uint8 if recipe == Recipe.MX else torch.float32
    data = torch.full((rows, width), 99, dtype=torch.uint8)
    scale_inv = torch.full(scale_shape(recipe, rows, width), 77, dtype=kind)
    if recipe == Recipe.TENSOR:
        options = {**options, "scale": torch.tensor([37.3]), "amax": torch.tensor([0.5])}
    return Target(recipe, data, scale_inv, **options)


def _inputs(rows: int, width: int, rho: int, normalize: bool, *, variants: bool = True) -> Inputs:
    """Rows of every size, of zeros, of NaN and infinity, of two experts and of nobody."""
    torch.manual_seed(0)
    x = (3 * torch.randn(rows, width)).bfloat16()
    x[0] = 0
    x[1, 3], x[2, width // 2] = torch.nan, torch.inf
    x[3] *= 1e-30
    x[4] *= 1e12
    x[5, : width // 2] *= 1e-4
    if not variants:
        return Inputs(x, torch.tensor([0.3, -0.4, 0.5]), torch.tensor([0.1]), rho=rho, normalize=normalize)
    x[-1] = torch.nan  # nobody's
    weight, bias = torch.tensor([[0.3, -0.4, 0.5], [1.0, 0.2, -0.7]]), torch.tensor([[0.1], [-0.2]])
    offsets = torch.tensor([rows // 3, rows - 1], dtype=torch.int32)
    return Inputs(x, weight, bias, None, torch.rand(rows) + 0.1, offsets, rho, normalize, 1e-6)


def _equal(target: Target, expected: Target) -> None:
    assert torch.equal(target.data, expected.data)
    assert torch.equal(target.scale_inv.view(torch.uint8), expected.scale_inv.view(torch.uint8))
    if expected.amax is not None and target.amax is not None:
        assert torch.equal(target.amax, expected.amax)


@needs_fused
@pytest.mark.parametrize(("rho", "normalize"), MEMBERS)
@pytest.mark.parametrize(("recipe", "options"), RECIPES)
@pytest.mark.parametrize(("rows", "width"), [(7, 32), (131, 416)])
def test_the_operation_writes_what_quantising_y_would(
    recipe: Recipe, options: dict[str, Any], rho: int, normalize: bool, rows: int, width: int
) -> None:
    _check_operation(recipe, options, _inputs(rows, width, rho, normalize))


def _check_operation(recipe: Recipe, options: dict[str, Any], inputs: Inputs) -> None:
    rows, width = inputs.x.shape
    target, expected = _target(recipe, rows, width, options), _target(recipe, rows, width, options)
    assert not problem(inputs, target)
    kept = forward(inputs, target)
    y, scales = torch.ops.polycom.polynomial(*inputs)
    expected.scale_inv.zero_()  # padding
    quantize(y, expected)
    _equal(target, expected)
    assert torch.equal(kept.view(torch.int32), scales.view(torch.int32))


@pytest.mark.parametrize(("rho", "normalize"), MEMBERS)
@pytest.mark.parametrize(("recipe", "options"), RECIPES)
@pytest.mark.parametrize(
    ("rows", "width"),
    [(7, 96), pytest.param(9, 2080, id="9-2080: a block a row")],
)
def test_the_kernels_write_what_quantising_y_would(
    emulator: Emulator,
    recipe: Recipe,
    options: dict[str, Any],
    rho: int,
    normalize: bool,
    rows: int,
    width: int,
) -> None:
    """Emulated; y is that of the forward kernel, which meets float64."""
    _check_kernel(emulator, recipe, options, _inputs(rows, width, rho, normalize))


@pytest.mark.parametrize(("recipe", "options"), RECIPES)
def test_the_kernels_of_the_widest_rows_do_so_too(
    emulator: Emulator, recipe: Recipe, options: dict[str, Any]
) -> None:
    _check_kernel(emulator, recipe, options, _inputs(7, 16416, 0, True))


def _check_kernel(emulator: Emulator, recipe: Recipe, options: dict[str, Any], inputs: Inputs) -> None:
    rows, width = inputs.x.shape
    target, expected = _target(recipe, rows, width, options), _target(recipe, rows, width, options)
    target.scale_inv.zero_()
    expected.scale_inv.zero_()
    kept = emulator.quantized(inputs, target)
    y, scales = emulator.forward(*inputs)
    quantize(y, expected)
    _equal(target, expected)
    assert torch.equal(kept.view(torch.int32), scales.view(torch.int32))


@pytest.mark.parametrize("factor", [1.0, 2.0**100], ids=["small", "large"])
@pytest.mark.parametrize(("recipe", "options"), RECIPES[1:])
@pytest.mark.parametrize("by", ["kernel", pytest.param("operation", marks=needs_fused)])
def test_the_scale_of_a_block_of_every_size(
    request: pytest.FixtureRequest, by: str, recipe: Recipe, options: dict[str, Any], factor: float
) -> None:
    """From zero and the least numbers to infinity; y is a multiple of x."""
    block = 32 if recipe == Recipe.MX else 128
    mantissas = torch.tensor([0, 1, 0x40, 0x5F, 0x60, 0x61, 0x7F])
    largest = (torch.arange(158).unsqueeze(1) << 7 | mantissas).flatten().to(torch.int16).view(torch.bfloat16)
    torch.manual_seed(0)
    x = largest.unsqueeze(1) * torch.rand(len(largest), block).bfloat16()
    x[:, 5] = largest
    weight = torch.tensor([0.0, 0.0, factor])
    inputs = Inputs(x, weight, torch.zeros(1), rho=1, normalize=False)
    if by == "kernel":
        _check_kernel(request.getfixturevalue("emulator"), recipe, options, inputs)
    else:
        _check_operation(recipe, options, inputs)


@pytest.mark.parametrize("by", ["kernel", pytest.param("operation", marks=needs_fused)])
def test_of_delayed_scaling_one_row_has_its_scale_and_a_larger_amax_is_kept(
    request: pytest.FixtureRequest, by: str
) -> None:
    inputs = Inputs(torch.randn(1, 64).bfloat16(), torch.tensor([0.3, -0.4, 0.5]), torch.tensor([0.1]))
    target, expected = (
        _target(Recipe.TENSOR, 1, 64, {})._replace(scale=torch.tensor([37.3]), amax=torch.tensor([1e9]))
        for _ in range(2)
    )
    if by == "kernel":
        request.getfixturevalue("emulator").quantized(inputs, target)
    else:
        forward(inputs, target)
    quantize(dispatch.polynomial(inputs), expected)
    _equal(target, expected)


@pytest.mark.parametrize("recipe", list(Recipe))
@pytest.mark.parametrize("given", ["float32", "order 2", "a bias before"])
def test_what_no_kernel_serves_is_quantised_after(recipe: Recipe, given: str) -> None:
    inputs = _inputs(6, 64, 0, True, variants=False)
    if given == "float32":
        inputs = inputs._replace(x=inputs.x.float())
    elif given == "order 2":
        inputs = inputs._replace(weight=inputs.weight[:2])
    else:
        inputs = inputs._replace(pre_bias=torch.randn(64))
    target, expected = _target(recipe, 6, 64, {}), _target(recipe, 6, 64, {})
    assert "fused" in problem(inputs, target)
    kept = forward(inputs, target)
    expected.scale_inv.zero_()
    quantize(dispatch.polynomial(inputs), expected)
    _equal(target, expected)
    assert [found is None for found in backward(inputs, kept, torch.ones_like(inputs.x))] == [
        tensor is None for tensor in inputs.tensors[:5]
    ]


@pytest.mark.parametrize("order", [3, 5], ids=["fused", "plain"])
def test_backward_is_that_of_y(order: int) -> None:
    inputs = _inputs(9, 64, 0, True, variants=False)
    x = torch.randn(9, 64).bfloat16()
    inputs = inputs._replace(x=x, weight=torch.randn(order), row_scale=torch.rand(9))
    grad = torch.randn(9, 64).bfloat16()
    found = backward(inputs, forward(inputs, _target(Recipe.MX, 9, 64, {})), grad)
    leaves = [None if t is None else t.clone().requires_grad_() for t in inputs.tensors[:5]]
    dispatch.polynomial(Inputs.of((*leaves, None), inputs.options)).backward(grad)
    for gradient, leaf in zip(found, leaves, strict=True):
        assert (gradient is None) == (leaf is None or leaf.grad is None)
        if gradient is not None and leaf is not None and leaf.grad is not None:
            assert torch.equal(gradient, leaf.grad)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": torch.empty(6, 63, dtype=torch.uint8)}, "data must be uint8"),
        ({"scale_inv": torch.empty(6)}, "scale_inv must be"),
        ({"recipe": Recipe.TENSOR, "scale_inv": torch.empty(1)}, "scale and amax"),
    ],
)
def test_buffers_that_do_not_fit_are_refused(change: dict[str, Any], sentence: str) -> None:
    inputs = _inputs(6, 64, 0, True, variants=False)
    with pytest.raises(ValueError, match=sentence):
        forward(inputs, _target(Recipe.BLOCKS, 6, 64, {})._replace(**change))


EVERY_BFLOAT16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_a_byte_is_that_of_torch_for_every_number(emulator: Emulator) -> None:
    """By the kernels' own conversion, of PolyReLU of x alone, and of its negative."""
    x = EVERY_BFLOAT16[1:0x7F81].reshape(-1, 32).clone()  # the positive ones, aligned
    for factor in (1.0, -1.0):
        target = _target(Recipe.TENSOR, len(x), x.shape[1], {})._replace(scale=torch.ones(1))
        weight = torch.tensor([0.0, 0.0, factor])
        emulator.quantized(Inputs(x, weight, torch.zeros(1), rho=1, normalize=False), target)
        usual = (factor * x.float()).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        finite = x.float() < 1e12  # and so is the third power, as a term of weight zero
        assert torch.equal(target.data[finite], usual[finite])


# Transformer Engine's own references, in plain torch

URL, TAG = "https://github.com/NVIDIA/TransformerEngine", "v2.18"
REFERENCES = "tests/pytorch/references"


@pytest.fixture(scope="module")
def transformer_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """Its reference of blocks, at TAG."""
    folder = tmp_path_factory.mktemp("transformer-engine")
    clone = [
        "git",
        "clone",
        "--quiet",
        "--depth",
        "1",
        "--filter",
        "blob:none",
        "--sparse",
        "--branch",
        TAG,
        URL,
    ]
    for command in ([*clone, str(folder)], ["git", "-C", str(folder), "sparse-checkout", "set", REFERENCES]):
        told = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if told.returncode != 0:
            pytest.skip(f"TransformerEngine is on GitHub only: {told.stderr.strip().splitlines()[-1]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((folder / REFERENCES).parent))
        yield importlib.import_module("references.blockwise_quantizer_reference")


@pytest.mark.github
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_blocks_are_those_of_transformer_engine(
    transformer_engine: ModuleType, power_of_two: bool, epsilon: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    y = (torch.randn(131, 416) * torch.exp2(torch.randint(-126, 120, (131, 1)).float())).to(dtype)
    y[0] = 0
    target = _target(Recipe.BLOCKS, 131, 416, {"power_of_two": power_of_two, "epsilon": epsilon})
    target.scale_inv.zero_()
    quantize(y, target)
    reference = transformer_engine.BlockwiseQuantizerReference()
    theirs = reference.quantize(
        y,
        torch.float8_e4m3fn,
        eps=epsilon,
        pow_2_scales=power_of_two,
        quant_tile_shape=(1, 128),
    )
    assert torch.equal(target.data, theirs.data.view(torch.uint8))
    assert torch.equal(target.scale_inv, theirs.scale)


def _exponents(y: Tensor) -> Tensor:
    target = _target(Recipe.MX, len(y), y.shape[1], {})
    quantize(y, target)
    return target.scale_inv[: len(y), : y.shape[1] // 32].long() - 127


def test_an_mx_scale_is_the_least_power_of_two_that_brings_its_block_within_the_format() -> None:
    """For every largest number of a block."""
    largest = EVERY_BFLOAT16[(EVERY_BFLOAT16 > 0) & EVERY_BFLOAT16.isfinite()]
    y = torch.zeros(len(largest), 32, dtype=torch.bfloat16)
    y[:, 7] = -largest
    exponent = _exponents(y).squeeze(1).double()
    exact = largest.double()
    assert bool((exact <= 448 * torch.exp2(exponent)).all())
    assert bool(((exact > 448 * torch.exp2(exponent - 1)) | (exponent == -127)).all())


def test_swizzled_scales_are_in_the_order_of_matrix_multiplications() -> None:
    """cuBLAS: tiles of 128 x 4, in each of them row r's four at 16 (r mod 32) + 4 (r div 32)."""
    y = torch.exp2(torch.randint(-40, 40, (200, 320)).float()).bfloat16()
    plain, swizzled = (_target(Recipe.MX, 200, 320, {"swizzled": way}) for way in (False, True))
    quantize(y, plain)
    quantize(y, swizzled)
    flat, tiles = swizzled.scale_inv.flatten(), plain.scale_inv.shape[1] // 4
    for row, block in [(0, 0), (31, 3), (32, 1), (127, 9), (128, 4), (199, 9)]:
        place = (row // 128 * tiles + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
        assert flat[place] == plain.scale_inv[row, block]
