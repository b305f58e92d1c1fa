"""The registry of activations: one name, one entry, and everything else is derived from it.

No torch is needed to read it: an entry's module is imported when one is built. Another package adds its own
activations under the entry point `polycom_ext.activations`, as NAME = "MODULE:ENTRY", ENTRY being an
`Activation`; see docs/adding-an-activation.md.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from polycom_ext.errors import PolycomError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import nn

GROUP = "polycom_ext.activations"
DEFAULT_ORDER = 3


@dataclass(frozen=True)
class Activation:
    """One entry of the registry."""

    name: str
    """Letters and digits, in lower case."""
    title: str
    """As written in the paper's tables."""
    target: str
    """MODULE:NAME of an nn.Module or, for an activation without parameters, of a function of one tensor."""
    gated: bool = False
    """The first linear layer gives twice the width; at equal parameters that width is 2/3 of an ungated
    one.
    """
    learnable: bool = False
    """Has parameters of its own: one-dimensional, whole on every rank, float32 masters, no weight decay."""
    ordered: bool = False
    """Is a polynomial, whose order a spec may give."""
    normalizes: bool = False
    """Reads whole rows: a row sharded over ranks needs a reduction."""
    scalars: int = 0
    """Parameters beside a polynomial's coefficients."""
    takes_variants: bool = False
    """Its module does: FC1's bias and a router's weight are part of its one pass (`functional.py`)."""
    keeps: int = 1
    """Tensors of x's size that backward needs beside the result, which the next layer keeps anyway."""

    def parameters(self, order: int | None) -> int:
        """How many numbers are learned, of an order where it is a polynomial."""
        return self.scalars + (order + 1 if order is not None else 0)

    def row_sums(self, order: int | None) -> int:
        """How many sums of each row are kept for backward, and reduced where rows are sharded."""
        return order or 0 if self.normalizes else 0

    def load(self) -> Callable[..., Any]:
        """The module's class, or the function; raises PolycomError where it cannot be imported."""
        module, _, name = self.target.partition(":")
        try:
            loaded: Callable[..., Any] = getattr(import_module(module), name)
        except Exception as error:
            raise _unimportable(self.name, self.target, error) from error
        return loaded


_MODULES = "polycom_ext.modules"
_FUNCTIONS = "polycom_ext.functional"
_POLYNOMIAL = {"learnable": True, "ordered": True}
_NORMALIZED = {**_POLYNOMIAL, "normalizes": True, "takes_variants": True}
_ENTRIES = (
    Activation("swiglu", "SwiGLU", f"{_MODULES}:SwiGLU", gated=True),
    Activation("gelu", "GELU", "torch.nn:GELU"),
    Activation("relu", "ReLU", "torch.nn:ReLU", keeps=0),
    Activation("relu2", "ReLU²", f"{_MODULES}:SquaredReLU"),
    Activation("silu", "SiLU", "torch.nn:SiLU"),
    Activation("mish", "Mish", f"{_FUNCTIONS}:mish"),
    Activation("hardswish", "HardSwish", f"{_FUNCTIONS}:hardswish"),
    Activation("prelu", "PReLU", f"{_MODULES}:PReLU", learnable=True, scalars=1),
    Activation("swish", "Swish-β", f"{_MODULES}:Swish", learnable=True, scalars=1),
    Activation("xielu", "xIELU", f"{_MODULES}:XIELU", learnable=True, scalars=2),
    Activation("polyrelu", "PolyReLU", f"{_MODULES}:PolyReLU", takes_variants=True, **_POLYNOMIAL),
    Activation("polyprelu", "PolyPReLU", f"{_MODULES}:PolyPReLU", scalars=1, **_POLYNOMIAL),
    Activation("polynorm", "PolyNorm", f"{_MODULES}:PolyNorm", **_NORMALIZED),
    Activation("polyrelunorm", "PolyReLUNorm", f"{_MODULES}:PolyReLUNorm", **_NORMALIZED),
)

REGISTRY: dict[str, Activation] = {entry.name: entry for entry in _ENTRIES}
"""Ours; `find` knows those of other packages too."""


def names() -> list[str]:
    """The activations there are, ours first."""
    return [*REGISTRY, *_others()]


def find(name: str) -> Activation:
    """The entry of a name; raises PolycomError for a name that has none."""
    if name in REGISTRY:
        return REGISTRY[name]
    if name not in _others():
        raise PolycomError(
            f"unknown activation {name!r}; known: {', '.join(names())} (NAME-ORDER for an order)"
        )
    point = _others()[name]
    try:
        entry = point.load()
    except Exception as error:
        raise _unimportable(name, point.value, error) from error
    if not isinstance(entry, Activation) or entry.name != name:
        raise PolycomError(f"the entry point {name} = {point.value!r} of {GROUP} is no Activation {name!r}")
    return entry


def _unimportable(name: str, place: str, error: Exception) -> PolycomError:
    return PolycomError(f"activation {name!r} cannot be imported from {place}: {error}")


def _others() -> dict[str, EntryPoint]:
    return {one.name: one for one in entry_points(group=GROUP) if one.name not in REGISTRY}


def parse(spec: str) -> tuple[Activation, int | None]:
    """Resolve NAME or NAME-ORDER, as in `polynorm` and `polyrelu-4`, to an entry and an order.

    The order is 3 unless given, None where the activation has none.

    Raises PolycomError for an unknown name, an order below 1, or an order for what is no polynomial.
    """
    match = re.fullmatch(r"(?P<name>[a-z0-9]+?)(?:-(?P<order>\d+))?", spec)
    entry = find(match["name"] if match else spec)
    if match is None or match["order"] is None:
        return entry, DEFAULT_ORDER if entry.ordered else None
    if not entry.ordered:
        raise PolycomError(f"activation {entry.name!r} has no polynomial, so no order can be given: {spec!r}")
    order = int(match["order"])
    if order < 1:
        raise PolycomError(f"the order of {spec!r} must be at least 1")
    return entry, order


def build(
    spec: str,
    *,
    width: int | None = None,
    hidden: int | None = None,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Make the module for NAME or NAME-ORDER.

    It is given those of these that its constructor names, and `order`.

    Args:
        width: of the activation's result on this rank.
        hidden: width of the model.
        group: process group over which the width is sharded.
        device, dtype: of its parameters.

    Raises PolycomError as `parse` does, for a width or a hidden size that the activation needs and is not
    given, and for parameters that are not what the entry says.
    """
    from polycom_ext.modules import Elementwise

    entry, order = parse(spec)
    target = entry.load()
    if not isinstance(target, type):
        return Elementwise(target)
    offered: dict[str, Any] = {"order": order, "width": width, "hidden": hidden}
    offered |= {"group": group, "device": device, "dtype": dtype}
    taken = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if offered.get(name) is not None:
            taken[name] = offered[name]
        elif name in offered and parameter.default is parameter.empty:
            raise PolycomError(f"activation {entry.name!r} needs `{name}`, which build was not given")
    module: nn.Module = target(**taken)
    _check(entry, module)
    return module


def _check(entry: Activation, module: nn.Module) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if bool(shapes) is not entry.learnable:
        raise PolycomError(
            f"activation {entry.name!r} says learnable={entry.learnable} and has parameters {list(shapes)}"
        )
    for name, shape in shapes.items():
        if len(shape) != 1:
            raise PolycomError(
                f"activation {entry.name!r}: parameter {name} must be one-dimensional, as what trainers "
                f"exempt from weight decay is, and has shape {shape}"
            )
