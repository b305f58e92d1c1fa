"""The learned coefficients of a Megatron `torch_dist` checkpoint, read without Megatron or the model.

Megatron saves through torch.distributed.checkpoint. Its keys are the parameters' names, and the layers of a
homogeneous stack share one key, with the layer as leading dimension:

    decoder.layers.mlp.activation_func.weight            (layers, r)
    decoder.layers.mlp.experts.activation_func.weight    (layers, r), or (layers, experts, r)
    decoder.layers.0.mlp.activation_func.weight          (r,)        where the layers of a model differ

Only these tensors are read: a few kilobytes, whatever the size of the checkpoint.
"""

from __future__ import annotations

import re
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from polycom_ext import activations
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron.saved import RELEASE, TRACKER, tracked
from polycom_ext.runs import record

_KEY = re.compile(r"(?P<module>.+)\.activation_func\.(?P<parameter>.+)")
_OPTIMIZER = re.compile(r"(^|\.)optimizer\.")
"""Moments and master copies repeat the parameters' names behind this prefix."""


def from_megatron(checkpoint_dir: str | Path, activation: str) -> dict[str, Any]:
    """Read what a PolyCom activation learned from a `torch_dist` checkpoint.

    Args:
        checkpoint_dir: an `iter_XXXXXXX` folder, or the folder above it, of which the latest is taken.
        activation: NAME[-ORDER] of the registry.

    Returns: what `record.coefficients` makes, under the names of the module's parameters; without layers for
        an activation that learns nothing.

    Raises PolycomError where there is no such checkpoint, or none with parameters of that activation.
    """
    entry, _ = activations.parse(activation)
    directory = _iteration_directory(Path(checkpoint_dir))
    layers: dict[str, dict[str, list[float]]] = {}
    if entry.learnable:
        for key, tensor in sorted(_load_coefficients(directory).items()):
            match = _KEY.fullmatch(key)
            assert match is not None
            for name, values in _split(match["module"], tensor):
                layers.setdefault(name, {})[match["parameter"]] = values
        if not layers:
            raise PolycomError(
                f"checkpoint {directory} holds no coefficients: it was not trained with {activation!r}"
            )
    expected = _lengths(activation) if layers else {}
    for name, parameters in layers.items():
        if {key: len(values) for key, values in parameters.items()} != expected:
            raise PolycomError(
                f"checkpoint {directory} does not hold {activation!r}: {name} has "
                + ", ".join(f"{key} of {len(values)}" for key, values in sorted(parameters.items()))
            )
    step = int(directory.name.removeprefix("iter_"))
    return record.coefficients(
        step, activation, [(name, layers[name]) for name in sorted(layers, key=_natural)]
    )


def _lengths(activation: str) -> dict[str, int]:
    """Of its parameters, which depend on no width."""
    module = activations.build(activation, width=1, hidden=1, device="meta")
    return {name: parameter.numel() for name, parameter in module.named_parameters()}


def _iteration_directory(directory: Path) -> Path:
    latest = directory / TRACKER
    if latest.is_file():
        named = tracked(directory)
        if named is None or named.name == RELEASE:
            raise PolycomError(f"{latest} names no iteration: give an iter_XXXXXXX folder")
        directory = named
    if not re.fullmatch(r"iter_\d+", directory.name) or not (directory / ".metadata").is_file():
        raise PolycomError(
            f"{directory} is not a torch_dist checkpoint of Megatron (an iter_XXXXXXX folder "
            "with a .metadata file)"
        )
    return directory


def _load_coefficients(directory: Path) -> dict[str, Tensor]:
    reader = dcp.FileSystemReader(directory)
    wanted: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and _KEY.fullmatch(key) and not _OPTIMIZER.search(key)
    }
    if wanted:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(wanted, storage_reader=reader, no_dist=True)
    return wanted


def _split(module: str, tensor: Tensor) -> list[tuple[str, list[float]]]:
    """One (name, values) for each index of the leading dimensions: layers first, then experts."""
    leading = list(product(*map(range, tensor.shape[:-1])))
    split = []
    for index in leading:
        rest = list(index)
        name = module
        if rest and re.search(r"\.layers\.(?!\d)", module):
            name = re.sub(r"\.layers\.(?!\d)", f".layers.{rest.pop(0)}.", module)
        split.append((".".join([name, *map(str, rest)]), tensor[index].double().tolist()))
    return split


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
