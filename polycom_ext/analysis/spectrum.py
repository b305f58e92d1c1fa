"""How much of its space a weight uses."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(weight: Tensor) -> Tensor:
    """exp(−Σ pᵢ ln pᵢ) of the singular values, each divided by their sum (paper, figure 6).

    The effective rank of Roy and Vetterli: n for n equal singular values, 1 for a single one, 0 for none.

    Args:
        weight: (…, rows, columns), of any type; the spectrum is computed in float32, of float64 in float64.

    Returns: (…)
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    values = torch.linalg.svdvals(wide)
    shares = values / values.sum(dim=-1, keepdim=True)
    return torch.where(values.sum(dim=-1) > 0, torch.special.entr(shares).sum(dim=-1).exp(), 0.0)
