"""What every operation asks of a call: the type to compute in, the ranks that share a row, torch.func.

And what is done with a factor a row where no fused operation does it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

SHARDED = (
    "rows that are sharded over a process group have first gradients only, by backward(): neither torch.func "
    "nor gradients of gradients work on them"
)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_size(group: dist.ProcessGroup | None) -> int:
    """Number of ranks that share a row; 1 without a group."""
    return 1 if group is None else group.size()


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum in place over the ranks that share a row."""
    if group_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def scale_rows(y: Tensor, row_scale: Tensor | None) -> Tensor:
    """y * row_scale[..., None], in the wider of the two types, then rounded to y's."""
    return y if row_scale is None else (y * row_scale.unsqueeze(-1)).to(y.dtype)


def transformed() -> bool:
    """Whether torch.func is at work: grad, vmap, jvp and what is made of them."""
    return torch._C._are_functorch_transforms_active()
