"""OLMo's Trainer on a CPU: 0.6.0, and the MoE branch with stand-ins for the kernels of megablocks.

Each function below mends one thing that upstream asks of CUDA, and says where. The CPU's generator and its
bfloat16 autocast stand in for the GPU's.
"""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch


def enable() -> None:
    """Mend torch's names, then OLMo's, which is imported; nothing where CUDA is available."""
    if torch.cuda.is_available():
        return
    _one_generator()
    torch.autocast = _Autocast  # type: ignore[misc, assignment]
    if find_spec("megablocks") is not None:
        import_module("polycom_ext.integrations.olmo.rehearsal_megablocks").install()
    _full_state_stays_where_it_is()


def _one_generator() -> None:
    """train.py saves and restores torch.cuda's random state together with the CPU's."""
    torch.cuda.get_rng_state = lambda *args: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)


class _Autocast(torch.autocast):
    """train.py autocasts "cuda", also in float32, which is no autocast."""

    def __init__(
        self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **kwargs: Any
    ) -> None:
        device_type = "cpu" if device_type == "cuda" else device_type
        super().__init__(device_type, dtype, enabled and dtype != torch.float32, **kwargs)


def _full_state_stays_where_it_is() -> None:
    """checkpoint.py offloads full state dicts to the CPU; FSDP crashes where the parameters are there."""
    checkpoint: Any = import_module("olmo.checkpoint")
    for name in ("FullStateDictConfig", "FullOptimStateDictConfig"):
        setattr(checkpoint, name, functools.partial(_without_offload, getattr(checkpoint, name)))


def _without_offload(config: Any, **kwargs: Any) -> Any:
    return config(**{**kwargs, "offload_to_cpu": False})
