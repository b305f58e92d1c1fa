"""OLMo (0.6.0 and the MoE branch) on a CPU: the few places that name CUDA, and one fault of torch.

Each function below mends one thing and says which. Devices, backends and process groups are the training
entry's business, see integrations/olmo/loop.py.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

import torch


def install() -> None:
    """Mend torch's names, then OLMo's; imports OLMo."""
    _autocast_on_cpu()
    _one_generator()
    _full_state_stays_where_it_is()


def _autocast_on_cpu() -> None:
    """train.py: every forward pass runs under torch.autocast("cuda")."""
    autocast = torch.autocast

    class OnCPU(autocast):  # type: ignore[valid-type, misc]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    torch.autocast = OnCPU  # type: ignore[misc]


def _one_generator() -> None:
    """train.py: the trainer's state holds the CUDA generator's, which needs a driver."""
    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)


def _full_state_stays_where_it_is() -> None:
    """checkpoint.py: FSDP crashes where it is to offload to the CPU what is already there."""
    checkpoint: Any = import_module("olmo.checkpoint")
    for name in ("FullStateDictConfig", "FullOptimStateDictConfig"):
        config = getattr(checkpoint, name)

        @functools.wraps(config)
        def without_offload(*args: Any, _config: Any = config, **kwargs: Any) -> Any:
            return _config(*args, **{**kwargs, "offload_to_cpu": False})

        setattr(checkpoint, name, without_offload)
