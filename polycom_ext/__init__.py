"""PolyCom for pre-training: polynomial composition activations for Megatron-LM and OLMo."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from polycom_ext._version import __version__ as __version__

if TYPE_CHECKING:
    from polycom_ext.activations import build
    from polycom_ext.functional import (
        poly_norm,
        poly_norm_linear,
        poly_prelu,
        poly_relu,
        poly_relu_linear,
        poly_relu_norm,
    )
    from polycom_ext.modules import PolyNorm, PolyPReLU, PolyReLU, PolyReLUNorm

__all__ = [
    "PolyNorm",
    "PolyPReLU",
    "PolyReLU",
    "PolyReLUNorm",
    "build",
    "poly_norm",
    "poly_norm_linear",
    "poly_prelu",
    "poly_relu",
    "poly_relu_linear",
    "poly_relu_norm",
]


def __getattr__(name: str) -> Any:
    """Import torch, and what needs it, only for who asks."""
    if name in ("activations", "functional", "modules"):
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "activations" if name == "build" else "functional" if name.startswith("poly_") else "modules"
    return getattr(import_module(f"{__name__}.{room}"), name)
