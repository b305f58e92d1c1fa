"""A block's activation by name, and its parameters' place in the optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from polycom_ext import activations


def build_activation(config: Any) -> nn.Module:
    """Make the activation that a ModelConfig's `activation_type` names, NAME or NAME-ORDER.

    The module carries `output_multiplier`, as OLMo's activations do: 0.5 for a gated one, which halves the
    width, else 1. Its parameters are float32 as all of OLMo's, made and initialised on `init_device`; FSDP's
    mixed precision hands the forward pass a rounded copy, as it does for norms. Raises PolycomError for an
    unknown name.
    """
    entry, _ = activations.parse(config.activation_type)
    width = config.mlp_hidden_size or config.mlp_ratio * config.d_model
    module = activations.build(
        config.activation_type,
        width=width // 2 if entry.gated else width,
        hidden=config.d_model,
        device=config.init_device,
    )
    module.output_multiplier = 0.5 if entry.gated else 1.0  # type: ignore[assignment]
    module.polycom_learnable = entry.learnable  # type: ignore[assignment]
    return module


def coefficient_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The learnable activations in a model, by name; one that several modules share counts once."""
    modules = model.named_modules()
    return {name: module for name, module in modules if getattr(module, "polycom_learnable", False)}


def coefficient_names(model: nn.Module) -> set[str]:
    """The names of their parameters; wrappers such as FSDP's are part of a name."""
    return {
        f"{name}.{parameter}"
        for name, module in coefficient_modules(model).items()
        for parameter, _ in module.named_parameters()
    }
