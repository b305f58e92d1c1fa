"""What is particular to the CPU kernels: rounding to the storage types, and every instruction set."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polycom_ext import functional
from polycom_ext.ops.polynomial import library

pytestmark = pytest.mark.skipif("cpu" not in library.devices, reason="the fused operations are not compiled")


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor where x > 0, by an operation that multiplies in float32 and rounds the product once."""
    return functional.poly_relu(x, torch.ones(1), torch.zeros(1), row_scale=factor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_product_is_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    bits = torch.arange(0, 0x8000, dtype=torch.int32).to(torch.int16)  # every positive number, infinity, NaN
    x = bits.view(dtype).repeat(9, 1)
    factor = torch.tensor([1, 1 - 2**-10, 1 + 2**-9, 1.5, 3, 0.75, 2**-9, 2**9 + 1, 2**-20 * 1.25])
    expected = (x.float() * factor.unsqueeze(1)).to(dtype)
    torch.testing.assert_close(_scaled(x, factor), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_nan_of_any_payload_stays_one(dtype: torch.dtype) -> None:
    payloads = torch.tensor([-1, 0x7FFFFFFF, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    for count in (1, 100):  # within whole vectors, and in the rest of a row
        added = payloads.repeat(count)
        y = functional.poly_relu(
            torch.ones(3, 4 * count, dtype=dtype), torch.ones(2), torch.zeros(1), pre_bias=added
        )
        assert y.isnan().all()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set is compiled here")
@pytest.mark.parametrize(("limit", "name"), [("default", "baseline"), ("avx2", "avx2")])
def test_every_instruction_set_passes_the_same_tests(limit: str, name: str) -> None:
    """Those that this machine would not choose by itself."""
    code = "import torch, polycom_ext; print(torch.ops.polycom.polynomial_build().split()[1])"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": limit}
    run: dict[str, Any] = {"env": environment, "capture_output": True, "text": True, "check": False}
    chosen = subprocess.run([sys.executable, "-c", code], **run).stdout.strip()
    if chosen != name:
        pytest.skip(f"this processor has no {name}")
    tests = Path(__file__).parents[1]
    files = [str(tests / "test_functional.py"), str(Path(__file__))]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "not instruction_set", *files]
    result = subprocess.run(command, **run)
    assert result.returncode == 0, result.stdout[-4000:]
