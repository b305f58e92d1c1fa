"""Gradient buckets of the distributed optimizer of which a rank's share holds no parameter."""

from __future__ import annotations

from typing import Any

import torch

from polycom_ext.errors import PolycomError


def padding_alone(optimizer: Any, state: dict[Any, Any], buffer: int, index: int) -> dict[str, Any]:
    """What stands for such a share as the optimizer is saved: one gap, as there are between parameters.

    Called by the patched `sharded_param_state_dp_reshardable`.

    Args:
        optimizer: Megatron's DistributedOptimizer.
        state: of all buckets of the rank, of which some may have been turned into ShardedTensors by now.
        buffer, index: of the bucket.
    """
    bucket = optimizer.buffers[buffer].buckets[index]
    group = optimizer.data_parallel_group
    size = bucket.grad_data.numel() // group.size()
    gap = {"gbuf_local_start": 0, "gbuf_local_end": size, "padding": True}
    if group.rank() * size >= bucket.numel_unpadded:
        return gap  # the padding up to a multiple of the ranks is not stored
    for buckets in (found for index, found in state.items() if isinstance(index, int)):
        for entry in (entry for of_type in buckets.values() for bucket in of_type for entry in bucket):
            # Which numbers are kept of a parameter, and as which types: the same in every bucket.
            tensors = {name: getattr(value, "data", None) for name, value in entry.items()}
            kept = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
            if kept:
                return {
                    **{
                        name: torch.empty(size, dtype=one.dtype, device=one.device)
                        for name, one in kept.items()
                    },
                    **gap,
                }
    raise PolycomError("a rank of the distributed optimizer holds no parameter at all: use fewer of them")
