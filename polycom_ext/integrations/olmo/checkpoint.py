"""OLMo's checkpoints: the formats that this torch writes and reads, and what may be loaded from elsewhere.

    torch_legacy   step*/rank*.pt, one file a process, read by as many processes as wrote it
    olmo_core      step*/{model,optim,train}, of ai2-olmo-core; any number of processes reads it
    unsharded      step*-unsharded/{model,optim,train}.pt

olmo_core itself unpickles an optimizer's settings from its files: load those of people whom you trust only.
From the others torch unpickles only what it is allowed to. What OLMo's own files hold is allowed here;
anything else is refused, unless `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1` says that the file may run any code.
Upstream's scripts/unshard.py needs that variable for every checkpoint; a spec with `load_path`,
`force_save_unsharded` and `dry_run` unshards without it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
import yaml
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import MEM_FORMAT_ENCODING, TensorProperties
from torch.distributed._shard.sharding_spec import ChunkShardingSpec, EnumerableShardingSpec
from torch.distributed.remote_device import _remote_device

from polycom_ext import activations
from polycom_ext.errors import PolycomError

ANY_CODE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""torch's own variable by which files may run any code when they are unpickled."""

NOT_HERE = {
    "torch_new": "torch of 2.3 and later cannot read what it saves",
    "local": "it is made for torch before 2.3",
}
"""Formats of `sharded_checkpointer` that OLMo 0.6.0 names -> why they do not work."""


def check_format(cfg: Any) -> None:
    """Raise PolycomError for a format of checkpoints that could not be saved, or not read back."""
    for option in ("sharded_checkpointer", "load_path_sharded_checkpointer"):
        name = getattr(cfg, option)
        if name in NOT_HERE:
            raise PolycomError(
                f"{option}: {name} does not work, {NOT_HERE[name]}; take torch_legacy or olmo_core"
            )
        if name == "olmo_core" and find_spec("olmo_core") is None:
            raise PolycomError(
                f"{option}: olmo_core needs a package: pip install ai2-olmo-core==0.1.0; or take torch_legacy"
            )


def check_source(cfg: Any, world_size: int) -> None:
    """Raise PolycomError for a `load_path` that is not there, or holds what this run could not load."""
    if cfg.load_path is None or "://" in cfg.load_path:
        return
    folder = Path(cfg.load_path)
    if not folder.is_dir():
        raise PolycomError(f"load_path: {folder} does not exist")
    unpickled = [*folder.glob("*.safetensors"), *folder.glob("train/*.safetensors")]
    if unpickled and os.environ.get(ANY_CODE) not in ("1", "y", "yes", "true"):
        raise PolycomError(
            f"load_path: {folder} holds a .safetensors file, whose names OLMo unpickles; if you trust it "
            f"with running any code, set {ANY_CODE}=1"
        )
    _check_activation(folder, cfg.model.activation_type)
    if str(folder).endswith("-unsharded"):
        return
    if cfg.distributed_strategy == "ddp":
        raise PolycomError(
            f"load_path: {folder} is a sharded checkpoint, which distributed_strategy: ddp cannot read; save "
            "it unsharded (save_interval_unsharded), or go on with fsdp"
        )
    name = str(cfg.load_path_sharded_checkpointer or cfg.sharded_checkpointer)
    saved = len(list(folder.glob("rank*.pt")))
    if name == "torch_legacy" and saved not in (0, world_size):
        raise PolycomError(
            f"load_path: {folder} was saved by {saved} processes, and torch_legacy needs as many to read it, "
            f"not {world_size}; save unsharded (save_interval_unsharded) to go on with another number"
        )
    if not (saved if name == "torch_legacy" else (folder / "model").is_dir()):
        raise PolycomError(
            f"load_path: {folder} is no checkpoint of {name}: name its own with "
            "load_path_sharded_checkpointer; the name of an unsharded one's folder ends in -unsharded"
        )


def _check_activation(folder: Path, activation: str) -> None:
    """Shapes do not tell one activation's coefficients, or its weights, from another's."""
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["model"][
            "activation_type"
        ]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return  # not beside the weights, or not OLMo's
    if saved != activation and _parsed(saved) != _parsed(activation):
        raise PolycomError(
            f"load_path: {folder} was trained with {saved}, not {activation}; if that is what you want, "
            "change activation_type in its config.yaml"
        )


def _parsed(activation: Any) -> Any:
    try:
        entry, order = activations.parse(activation)
    except (PolycomError, TypeError, AttributeError):
        return activation
    return entry.name, order


@contextmanager
def reading(folder: str) -> Iterator[None]:
    """Let torch unpickle what OLMo's checkpoints hold; raises PolycomError for what could not be loaded."""
    try:
        with torch.serialization.safe_globals(_allowed()):
            yield
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0].partition(". ")[0]
        raise PolycomError(
            f"load_path: {folder} holds more than OLMo's own checkpoints do ({reason or error}); if you "
            f"trust it with running any code, set {ANY_CODE}=1"
        ) from None
    except FileNotFoundError as error:
        raise PolycomError(
            f"load_path: {folder} is not complete: {error.filename or error} is missing"
        ) from None


def _allowed() -> list[Any]:
    """Paths, numpy's random state, and what a sharded tensor consists of: none runs code when it is made."""
    numbers = [type(np.dtype(code)) for code in ("uint32", "int64", "float64")]
    shards = [
        ShardedTensor,
        ShardedTensor.ProcessGroupState,
        ShardedTensorMetadata,
        Shard,
        ShardMetadata,
        TensorProperties,
    ]
    placement = [ChunkShardingSpec, EnumerableShardingSpec, _remote_device, MEM_FORMAT_ENCODING]
    named: list[Any] = [(_member, "builtins.getattr")]
    named += [(PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")]
    make_array, make_scalar = np.zeros(0).__reduce__()[0], np.float64().__reduce__()[0]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy before 2, and since
        named += [(make_array, f"{module}._reconstruct"), (make_scalar, f"{module}.scalar")]
    return [np.ndarray, np.dtype, *numbers, *shards, *placement, *named]


def _member(cls: Any, name: str) -> Any:
    """The getattr by which pickle names a member of an enumeration and a class in a class; nothing else."""
    if cls is MEM_FORMAT_ENCODING:
        return cls[name]
    if (cls, name) == (ShardedTensor, "ProcessGroupState"):
        return ShardedTensor.ProcessGroupState
    raise pickle.UnpicklingError(f"getattr of {name}")


def begin_state(cfg: Any, optim: torch.optim.Optimizer) -> None:
    """Give an optimizer the state of its start where olmo_core would do so.

    olmo_core 0.1.0 makes that state by a step with zero gradients, which decays the weights: those just
    loaded, too, so that every resume was another run.
    """
    if "olmo_core" not in (cfg.sharded_checkpointer, cfg.load_path_sharded_checkpointer):
        return
    rates = [group["lr"] for group in optim.param_groups]
    for group in optim.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            if parameter.numel():
                parameter.grad = torch.zeros_like(parameter)
    optim.step()
    optim.zero_grad()
    for group, rate in zip(optim.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optim.state.values():
        if "step" in state:
            state["step"].zero_()
