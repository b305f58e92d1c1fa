"""The public functions beside their float64 definitions, and how they are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from polycom_ext import functional, reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""Relative error of the result, as a ratio of norms (design: precision)."""
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "poly_relu": (functional.poly_relu, reference.poly_relu),
    "poly_norm": (functional.poly_norm, reference.poly_norm),
    "poly_relu_norm": (functional.poly_relu_norm, reference.poly_relu_norm),
}


def error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach(), expected.detach()
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None, "backward has not reached this tensor"
    return leaf.grad


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """What autograd keeps for backward in this context."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def coefficients(order: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(order, dtype=dtype), torch.randn(1, dtype=dtype)
