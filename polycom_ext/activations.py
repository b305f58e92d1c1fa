"""The activations as modules, and the registry: one name, one entry, everything else is derived from it."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polycom_ext import functional
from polycom_ext.errors import PolycomError

DEFAULT_ORDER = 3


class _Polynomial(nn.Module):
    """Holds `weight` (order,), descending powers, and `bias` (1,); initialised to 1/order and 0 as in the
    paper.

    A copy, shallow or deep, shares the process group. A pickled module (torch.save of it, not of its state)
    has none: who loads it sets `group` again where rows are sharded.
    """

    def __init__(
        self,
        order: int = DEFAULT_ORDER,
        *,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        self.order = order
        self.group = group
        self.weight = nn.Parameter(torch.empty(order, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight = 1/order, bias = 0 (paper, section 4.1)."""
        nn.init.constant_(self.weight, 1.0 / self.order)
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"order={self.order}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None}

    def __copy__(self) -> _Polynomial:
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> _Polynomial:
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        state = {key: value for key, value in self.__dict__.items() if key != "group"}
        twin.__dict__.update(copy.deepcopy(state, memo), group=self.group)
        return twin


class PolyReLU(_Polynomial):
    """sum_i a_i ReLU(x)^i + a_0; see `functional.poly_relu`."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.poly_relu(x, self.weight, self.bias, group=self.group)


class PolyPReLU(_Polynomial):
    """sum_i a_i PReLU(x)^i + a_0 with a learnable negative slope, 0.25 at the start; see
    `functional.poly_prelu`.
    """

    def __init__(
        self,
        order: int = DEFAULT_ORDER,
        *,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(order, group=group, device=device, dtype=dtype)
        self.slope = nn.Parameter(torch.full((1,), 0.25, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "slope"):
            nn.init.constant_(self.slope, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        return functional.poly_prelu(x, self.weight, self.bias, self.slope, group=self.group)


class PolyNorm(_Polynomial):
    """sum_i a_i x^i / rms(x^i) + a_0 over the last dimension; see `functional.poly_norm`."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return functional.poly_norm(x, self.weight, self.bias, self.eps, group=self.group)


class PolyReLUNorm(_Polynomial):
    """PolyNorm of ReLU(x); see `functional.poly_relu_norm`."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return functional.poly_relu_norm(x, self.weight, self.bias, self.eps, group=self.group)


class SquaredReLU(nn.Module):
    """ReLU(x)^2."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x).square()


class SwiGLU(nn.Module):
    """SiLU(x_1) * x_2, where x = [x_1, x_2] are the halves of the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * value


@dataclass(frozen=True)
class Activation:
    """One entry of the registry."""

    name: str
    title: str
    """As written in the paper's tables."""
    module: type[nn.Module]
    gated: bool = False
    """The first linear layer gives twice the width; at equal parameters that width is 2/3 of an ungated
    one.
    """
    coefficients: bool = False
    """Has learnable coefficients, and so an order."""
    normalizes: bool = False
    """Reads whole rows: a row sharded over ranks needs a reduction."""


_ENTRIES = (
    Activation("swiglu", "SwiGLU", SwiGLU, gated=True),
    Activation("gelu", "GELU", nn.GELU),
    Activation("relu", "ReLU", nn.ReLU),
    Activation("relu2", "ReLU²", SquaredReLU),
    Activation("silu", "SiLU", nn.SiLU),
    Activation("polyrelu", "PolyReLU", PolyReLU, coefficients=True),
    Activation("polyprelu", "PolyPReLU", PolyPReLU, coefficients=True),
    Activation("polynorm", "PolyNorm", PolyNorm, coefficients=True, normalizes=True),
    Activation("polyrelunorm", "PolyReLUNorm", PolyReLUNorm, coefficients=True, normalizes=True),
)

REGISTRY: dict[str, Activation] = {entry.name: entry for entry in _ENTRIES}


def parse(spec: str) -> tuple[Activation, int]:
    """Resolve NAME or NAME-ORDER, as in `polynorm` and `polyrelu-4`, to an entry and an order (3 unless
    given).

    Raises PolycomError for an unknown name, an order below 1, or an order for an activation without
    coefficients.
    """
    match = re.fullmatch(r"(?P<name>[a-z0-9]+?)(?:-(?P<order>\d+))?", spec)
    entry = REGISTRY.get(match["name"]) if match else None
    if match is None or entry is None:
        raise PolycomError(
            f"unknown activation {spec!r}; known: {', '.join(REGISTRY)} (NAME-ORDER for an order)"
        )
    if match["order"] is None:
        return entry, DEFAULT_ORDER
    if not entry.coefficients:
        raise PolycomError(f"activation {entry.name!r} has no polynomial, so no order can be given: {spec!r}")
    order = int(match["order"])
    if order < 1:
        raise PolycomError(f"the order of {spec!r} must be at least 1")
    return entry, order


def build(spec: str, **kwargs: Any) -> nn.Module:
    """Make the module for NAME or NAME-ORDER; `group`, `device`, `dtype` go to activations with
    coefficients.
    """
    entry, order = parse(spec)
    return entry.module(order, **kwargs) if entry.coefficients else entry.module()
