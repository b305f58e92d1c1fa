"""The CUDA kernels without a GPU: their source on the CPU against float64, nvcc's machine code for spills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polycom_ext import reference
from polycom_ext.ops import build

from ..oracle import gradient, leaves
from .emulated import APPLY, REDUCE, Emulator

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
IDENTITY, RELU = 0, 1
MEMBERS = {"polynorm": (IDENTITY, True), "polyrelunorm": (RELU, True), "polyrelu": (RELU, False)}

# Width -> the instances it must choose, forward and backward, for 16-bit types and for float32.
NARROW, NARROW_8 = "4 vectors, 32 of 128 threads", "8 vectors, 32 of 128 threads"
WIDEST, LOOPED = "16 vectors, 256 of 256 threads", "0 vectors, 512 of 512 threads"
INSTANCES_16 = {
    8: (NARROW, NARROW),
    1024: (NARROW, NARROW),
    1536: (NARROW_8, NARROW_8),
    2056: ("8 vectors, 64 of 64 threads", "8 vectors, 64 of 64 threads"),
    8192 + 8: ("8 vectors, 160 of 160 threads", "8 vectors, 160 of 160 threads"),
    32768: (WIDEST, WIDEST),
    1001: (LOOPED, LOOPED),
    32768 + 8: (LOOPED, LOOPED),
}
INSTANCES_32 = {
    512: (NARROW, NARROW),
    1024: (NARROW_8, NARROW_8),
    1536: ("8 vectors, 64 of 64 threads", "8 vectors, 64 of 64 threads"),
    8192 + 4: ("16 vectors, 160 of 160 threads", "16 vectors, 160 of 160 threads"),
    16384: (WIDEST, WIDEST),
    16384 + 4: (LOOPED, LOOPED),
    37: ("0 vectors, 64 of 64 threads", "0 vectors, 64 of 64 threads"),
}
CASES = [(dtype, width) for dtype in (torch.bfloat16, torch.float16) for width in INSTANCES_16]
CASES += [(torch.float32, width) for width in INSTANCES_32]


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def _expected(
    x: Tensor, weight: Tensor, bias: Tensor, rho: int, normalize: bool, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y, grad_x and the coefficient gradients (powers descending, constant) by autograd through float64."""
    x, weight, bias = leaves(x.double(), weight.double(), bias.double())
    u = x.relu() if rho == RELU else x
    y = reference.poly_norm(u, weight, bias) if normalize else reference.poly_relu(u, weight, bias)
    y.backward(grad_y.double())
    return y.detach(), gradient(x), torch.cat((gradient(weight), gradient(bias)))


def _check(
    emulator: Emulator, dtype: torch.dtype, width: int, order: int, member: str, rows: int = 5
) -> None:
    torch.manual_seed(width + order)
    rho, normalize = MEMBERS[member]
    x, grad_y = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    weight, bias = torch.randn(order), torch.randn(1)
    y, scales = emulator.forward(x, weight, bias, None, None, None, rho, normalize, 1e-6)
    forward, backward = (INSTANCES_32 if dtype == torch.float32 else INSTANCES_16)[width]
    assert emulator.shape == forward
    grad_x, coefficients, _, again = emulator.backward(
        grad_y, x, weight, bias, scales, None, None, None, rho, normalize, True
    )
    assert emulator.shape == backward
    expected_y, expected_grad_x, expected_coefficients = _expected(x, weight, bias, rho, normalize, grad_y)
    assert _error(y, expected_y) < TOLERANCE[dtype]
    assert _error(grad_x, expected_grad_x) < TOLERANCE[dtype]
    assert _error(coefficients[0], expected_coefficients) < 1e-5
    assert again is not None
    assert torch.equal(again, y)


@pytest.mark.parametrize(("dtype", "width"), CASES)
def test_order_3_of_polynorm_matches_float64(emulator: Emulator, dtype: torch.dtype, width: int) -> None:
    _check(emulator, dtype, width, 3, "polynorm", rows=2)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_every_order_and_member_matches_float64(emulator: Emulator, order: int, member: str) -> None:
    _check(emulator, torch.bfloat16, 1024, order, member, rows=14)  # more rows than the grid holds


@pytest.mark.full
@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("dtype", "width"), CASES)
def test_every_instance_matches_float64(
    emulator: Emulator, dtype: torch.dtype, width: int, order: int, member: str
) -> None:
    _check(emulator, dtype, width, order, member)


@pytest.mark.parametrize(
    ("kibibytes", "width", "backward"), [(163, 16384, WIDEST), (99, 16384, LOOPED), (99, 8256, None)]
)
def test_no_row_is_staged_in_more_shared_memory_than_a_block_may_have(
    emulator: Emulator, kibibytes: int, width: int, backward: str | None
) -> None:
    """99 KiB are those of compute capability 8.6, 8.9 and 12.0, for which code of sm_80 or PTX runs."""
    x, weight, bias = torch.randn(7, width), torch.randn(3), torch.randn(1)
    common = (None, None, None, IDENTITY, True)
    with emulator.with_shared_memory(kibibytes * 1024):
        _, scales = emulator.forward(x, weight, bias, *common, 1e-6)
        grad_x = emulator.backward(x.cos(), x, weight, bias, scales, *common, False)[0]
    assert emulator.shape == (backward or "16 vectors, 160 of 160 threads")
    assert _error(grad_x, _expected(x, weight, bias, IDENTITY, True, x.cos())[1]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("width", [1024, 1001])
def test_large_rows_do_not_overflow(emulator: Emulator, width: int) -> None:
    x = torch.stack((torch.randn(width), torch.randn(width) * 1e18, torch.zeros(width))).bfloat16()
    x[0, 3] = 3e38
    weight, bias = torch.randn(4), torch.randn(1)
    y, scales = emulator.forward(x, weight, bias, None, None, None, IDENTITY, True, 1e-6)
    grad_x = emulator.backward(x.sign(), x, weight, bias, scales, None, None, None, IDENTITY, True, False)[0]
    assert _error(y, reference.poly_norm(x, weight, bias)) < TOLERANCE[torch.bfloat16]
    assert grad_x.isfinite().all()


@pytest.mark.parametrize("width", [1024, 1001])
def test_variants_agree_with_the_cpu_operations(emulator: Emulator, width: int) -> None:
    torch.manual_seed(width)
    dtype, rows, experts = torch.float32, 11, 4
    x, grad_y = torch.randn(rows, width, dtype=dtype), torch.randn(rows, width, dtype=dtype)
    x[10], grad_y[10] = torch.nan, torch.nan
    weight, bias = torch.randn(experts, 3), torch.randn(experts, 1)
    pre_bias, row_scale = torch.randn(experts, width), torch.rand(rows)
    offsets = torch.tensor([3, 3, 7, 10], dtype=torch.int32)  # an expert without rows, a row of nobody's
    variants = (pre_bias, row_scale, offsets, IDENTITY, True)
    ops = torch.ops.polycom
    y, scales = emulator.forward(x, weight, bias, *variants, 1e-6)
    backward = emulator.backward(grad_y, x, weight, bias, scales, *variants, False)
    assert backward[2] is not None
    cpu_y, cpu_scales = ops.polynomial(x, weight, bias, *variants, 1e-6)
    cpu_backward = ops.polynomial_backward(x, weight, bias, *variants, 1e-6, grad_y, cpu_scales, False)
    torch.testing.assert_close(y, cpu_y, rtol=1e-5, atol=1e-5)
    assert not any(part[10].any() for part in (y, scales, backward[0], backward[2]))
    for actual, expected in zip(backward[:3], cpu_backward[:3], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("member", ["polynorm", "polyrelunorm"])
def test_two_shards_are_one_row(emulator: Emulator, member: str) -> None:
    rho, normalize = MEMBERS[member]
    width, rows, order = 256, 3, 4
    x, grad_y = torch.randn(rows, 2 * width), torch.randn(rows, 2 * width)
    x[1] *= 1e12
    x[2] = x[2].clamp(-1, 1) * 3.4e38
    weight, bias = torch.randn(order), torch.randn(1)
    expected_y, expected_grad_x, _ = _expected(x, weight, bias, rho, normalize, grad_y)
    shards = list(zip(x.split(width, 1), grad_y.split(width, 1), strict=True))
    shards = [(a.contiguous(), b.contiguous()) for a, b in shards]

    sums = [torch.empty(rows, order, dtype=torch.float64) for _ in shards]
    dots = [torch.empty(rows, order + 1) for _ in shards]
    common = (None, None, None, rho, normalize)
    for (part, _), total in zip(shards, sums, strict=True):
        emulator.forward(part, weight, bias, *common, 1e-6, step=REDUCE, power_sums=total)
    arguments: dict[str, Any] = {"step": APPLY, "total_width": 2 * width}
    outputs = [
        emulator.forward(part, weight, bias, *common, 1e-6, power_sums=sums[0] + sums[1], **arguments)
        for part, _ in shards
    ]
    assert _error(torch.cat([y for y, _ in outputs], 1), expected_y) < TOLERANCE[torch.float32]

    for (part, grad), (_, scales), total in zip(shards, outputs, dots, strict=True):
        emulator.backward(grad, part, weight, bias, scales, *common, False, step=REDUCE, dots=total)
    grads = [
        emulator.backward(
            grad, part, weight, bias, scales, *common, False, dots=dots[0] + dots[1], **arguments
        )[0]
        for (part, grad), (_, scales) in zip(shards, outputs, strict=True)
    ]
    assert _error(torch.cat(grads, 1)[0], expected_grad_x[0]) < TOLERANCE[torch.float32]
    assert _error(torch.cat(grads, 1)[1], expected_grad_x[1]) < TOLERANCE[torch.float32]


def test_emulator_refuses_a_barrier_that_not_all_threads_reach(tmp_path: Path) -> None:
    source = tmp_path / "diverged.cpp"
    source.write_text(
        '#include "block_emulator.h"\n'
        "int main() { emulator::launch(1, 64, [] { if (threadIdx.x < 32) __syncthreads(); "
        "else __shfl_xor_sync(~0u, 1.0f, 1); }); }\n"
    )
    program = tmp_path / "diverged"
    here = str(Path(__file__).parent)
    build.run([build.find_cxx(), "-std=c++20", "-w", f"-I{here}", str(source), "-o", str(program)])
    with pytest.raises(build.BuildError, match="a barrier that not all threads reach"):
        build.run([str(program)])
