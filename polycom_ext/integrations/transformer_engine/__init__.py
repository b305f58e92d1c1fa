"""The learnable activations as operations of Transformer Engine: `te.ops.Sequential(…, PolyNorm(), …)`.

`PolyReLU`, `PolyNorm`, … are classes of this module, and `ScaledPolyReLU`, `ScaledPolyNorm`, … take a factor
a row beside x: one for each learnable entry of the registry, other packages' included, under its module's
name. `operation_of` makes the operation for a module that is there already. Importing this room registers its
fusions with TE's operation fuser. It needs Transformer Engine 2.13; see docs/transformer-engine.md.
"""

from __future__ import annotations

from typing import Any

from polycom_ext import activations
from polycom_ext.errors import PolycomError

try:
    from transformer_engine.pytorch.ops import register_forward_fusion as register_forward_fusion
except ImportError as error:
    raise PolycomError(
        "cannot import Transformer Engine 2.13 or later, whose operation fuser takes operations of others "
        f"({error}); it is installed by `pip install --no-build-isolation transformer-engine[pytorch]`"
    ) from error

from polycom_ext.integrations.transformer_engine import fusions
from polycom_ext.integrations.transformer_engine.operations import SCALED, named, operation_of

__all__ = ["named", "operation_of"]


def _classes() -> dict[str, str]:
    """Name of a module's class -> name in the registry, of what learns."""
    learnable = (activations.find(name) for name in activations.names())
    return {entry.target.rpartition(":")[2]: entry.name for entry in learnable if entry.learnable}


def __getattr__(name: str) -> Any:
    entry = None if name.startswith("_") else _classes().get(name.removeprefix(SCALED))
    if entry is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return named(entry, scaled=name.startswith(SCALED))


def __dir__() -> list[str]:
    return sorted([*globals(), *(prefix + name for name in _classes() for prefix in ("", SCALED))])


fusions.register()
