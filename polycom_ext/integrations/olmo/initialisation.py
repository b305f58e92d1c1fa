"""Initial weights that depend on the seed only: not on the strategy, nor on the number of ranks.

Upstream seeds all ranks alike and lets FSDP's ranks fill their own shards: all draw the same numbers, so that
on two ranks the embedding starts equal to the output layer, and other numbers of ranks start elsewhere. Here
each parameter is drawn whole, after seeding with the run's seed and the parameter's name, and a rank keeps
what it holds of it. No more than one parameter at a time is whole.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from polycom_ext.errors import PolycomError

INITIALISERS = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
Whole = dict[Tensor, tuple[str, torch.Size, int]]
"""Parameter -> its name in the model, its shape when whole, and where this rank's part begins in it."""


def reset_parameters(model: Any, dist_model: nn.Module, seed: int) -> None:
    """Initialise an OLMo as its configuration says, under FSDP (with use_orig_params) or DDP.

    Raises PolycomError where that would leave a parameter of the meta device as the memory was: the branch
    leaves its shared experts as torch makes them.
    """
    whole = _whole(model, dist_model)
    meta = model.config.init_device == "meta"
    for parameter in whole if meta else ():
        nn.init.constant_(parameter, torch.nan)
    with _drawn_whole(whole, seed):
        model.reset_parameters()
    for parameter, (name, _, _) in whole.items() if meta else ():
        if parameter.isnan().any():
            raise PolycomError(f"model.init_device: meta would leave {name} without a value; take cpu")


def _whole(model: nn.Module, dist_model: nn.Module) -> Whole:
    shards = {
        parameter: (shape, shard.intra_param_start_idx or 0)
        for unit in FSDP.fsdp_modules(dist_model)
        for flat in unit.params
        for parameter, shape, shard in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True)
    }
    return {
        parameter: (name.replace("_fsdp_wrapped_module.", ""), *shards.get(parameter, (parameter.shape, 0)))
        for name, parameter in model.named_parameters()
    }


@contextmanager
def _drawn_whole(whole: Whole, seed: int) -> Iterator[None]:
    """Let the functions of torch.nn.init do so; they may look at a shape, or redraw what is out of bounds."""
    originals = {name: getattr(nn.init, name) for name in INITIALISERS}
    try:
        for name, initialise in originals.items():
            setattr(nn.init, name, _on_whole(initialise, whole, seed))
        yield
    finally:
        for name, initialise in originals.items():
            setattr(nn.init, name, initialise)


def _on_whole(initialise: Callable[..., Tensor], whole: Whole, seed: int) -> Callable[..., Tensor]:
    @functools.wraps(initialise)
    def apply(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if tensor not in whole:
            return initialise(tensor, *args, **kwargs)
        name, shape, start = whole[tensor]
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        with torch.no_grad(), torch.random.fork_rng([tensor.device] if tensor.is_cuda else []):
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            full = initialise(tensor.new_empty(shape), *args, **kwargs)
            return tensor.copy_(full.flatten()[start : start + tensor.numel()].view_as(tensor))

    return apply
