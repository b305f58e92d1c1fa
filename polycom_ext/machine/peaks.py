"""How fast a GPU is at most, by its name: what measured speeds are set beside."""

from __future__ import annotations

import re

TFLOPS = {
    r"A100.*": 312.0,
    r"H100 PCIe": 756.0,
    r"H100 NVL": 835.0,
    r"H100( \d+GB HBM3)?": 989.0,
    r"H200 NVL": 835.0,
    r"H200": 989.0,
    r"B200": 2250.0,
}
"""A pattern of the driver's name -> 10¹² FLOP/s of its tensor cores in bfloat16 without sparsity.

NVIDIA's datasheets, which give twice as much from the H100 on: theirs are with sparsity.
"""
SLICE = re.compile(r".*\bMIG\b.*")
"""A part of a GPU, as MIG cuts it: how fast it is nobody publishes."""


def peak_flops(name: str) -> float | None:
    """FLOP/s of the GPU that the driver calls `NVIDIA A100-SXM4-80GB`; None where none is published here."""
    model = name.removeprefix("NVIDIA ")
    if SLICE.fullmatch(model):
        return None
    return next((1e12 * tflops for pattern, tflops in TFLOPS.items() if re.fullmatch(pattern, model)), None)


GIB = {
    r"A100.*40GB.*": 40.0,
    r"A100.*80GB.*": 80.0,
    r"H100 PCIe": 80.0,
    r"H100 NVL": 94.0,
    r"H100( \d+GB HBM3)?": 80.0,
    r"H200.*": 141.0,
    r"B200": 180.0,
}
"""A pattern of the driver's name -> its memory, of datasheets, of which the driver keeps up to 2 % back."""


def memory(name: str) -> float | None:
    """Bytes of a GPU's memory, by its name as `peak_flops` takes it; None where none is published here."""
    model = name.removeprefix("NVIDIA ")
    if SLICE.fullmatch(model):
        return None
    return next((2**30 * gib for pattern, gib in GIB.items() if re.fullmatch(pattern, model)), None)
