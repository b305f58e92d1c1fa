"""How much of its space a weight uses."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(weight: Tensor) -> Tensor:
    """exp(−Σ pᵢ ln pᵢ) of the singular values, each divided by their sum (paper, figure 6).

    The effective rank of Roy and Vetterli: n for n equal singular values, 1 for a single one, 0 for none; not
    a number where one of the weight's is none, or is infinite.

    Args:
        weight: (…, rows, columns), of any type; the spectrum is computed in float32, of float64 in float64.

    Returns: (…)
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    largest = wide.abs().amax(dim=(-2, -1), keepdim=True)
    finite = largest.isfinite()
    scaled = torch.where(finite & (largest > 0), wide / largest, 0.0)  # sums neither overflow nor vanish
    values = torch.linalg.svdvals(scaled)
    shares = values / values.sum(dim=-1, keepdim=True)
    ranks = torch.where(values.sum(dim=-1) > 0, torch.special.entr(shares).sum(dim=-1).exp(), 0.0)
    return torch.where(finite[..., 0, 0], ranks, torch.nan)
