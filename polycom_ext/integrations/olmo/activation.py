"""A block's activation by name, and its coefficients' place in the optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from polycom_ext import activations


def build_activation(config: Any) -> nn.Module:
    """Make the activation that a ModelConfig's `activation_type` names, NAME or NAME-ORDER.

    The module carries `output_multiplier`, as OLMo's activations do: 0.5 for a gated one, which halves the
    width, else 1. Its coefficients are float32 as all of OLMo's parameters, made and initialised on
    `init_device`; FSDP's mixed precision hands the forward pass a rounded copy, as it does for norms. Raises
    PolycomError for an unknown name.
    """
    entry, _ = activations.parse(config.activation_type)
    module = activations.build(config.activation_type, device=config.init_device)
    module.output_multiplier = 0.5 if entry.gated else 1.0  # type: ignore[assignment]
    return module


NATIVE = ("swiglu", "gelu", "relu")
"""What OLMo builds itself, patched or not."""


def coefficient_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The activations with coefficients in a model, by name; one that several modules share counts once."""
    classes = tuple(entry.module for entry in activations.REGISTRY.values() if entry.coefficients)
    return {name: module for name, module in model.named_modules() if isinstance(module, classes)}


def coefficient_names(model: nn.Module) -> set[str]:
    """The names of their parameters; wrappers such as FSDP's are part of a name."""
    return {
        f"{name}.{parameter}"
        for name, module in coefficient_modules(model).items()
        for parameter, _ in module.named_parameters(recurse=False)
    }
