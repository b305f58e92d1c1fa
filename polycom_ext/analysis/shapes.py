"""What function an activation is, on a row of numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

POINTS = 65
"""That a curve keeps, of however wide a row."""


@dataclass(frozen=True)
class Shape:
    """y(x) for the numbers of one row, by which an activation that normalises is fixed, ascending in x."""

    rms: float
    """Of the row."""
    x: list[float]
    y: list[float]


def on_row(x: Tensor, y: Tensor) -> Shape:
    """Of a row and what an activation made of it, both (width,); of a wide one those near an even grid."""
    x, order = x.double().sort()
    grid = x if len(x) <= POINTS else torch.linspace(float(x[0]), float(x[-1]), POINTS, dtype=x.dtype)
    places = torch.searchsorted(x, grid).clamp(max=len(x) - 1).unique()
    rms = float(x.square().mean().sqrt())
    return Shape(rms, x[places].tolist(), y.double()[order][places].tolist())


def on_normal_row(module: nn.Module, width: int) -> Shape:
    """On the quantiles of the standard normal distribution; of a module in float64."""
    x = torch.special.ndtri((torch.arange(width, dtype=torch.float64) + 0.5) / width)
    return on_row(x, module(x).detach())
