"""What one call of the family is given, as one value: spelled out only where Python hands it to others."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from torch import Tensor


class Rho(IntEnum):
    """What is applied to x before the powers are formed."""

    IDENTITY = 0
    RELU = 1
    PRELU = 2


class Inputs(NamedTuple):
    """In the order of the operators' schemas (csrc/operators.h); tensors as in functional.py.

    Plain operations neither slice it nor ask its properties: torch.compile before 2.11 traces neither.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    pre_bias: Tensor | None = None
    row_scale: Tensor | None = None
    offsets: Tensor | None = None
    rho: int = Rho.IDENTITY
    normalize: bool = True
    eps: float = 1e-6

    @property
    def order(self) -> int:
        return self.weight.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those that have gradients, and offsets."""
        return self.x, self.weight, self.bias, self.pre_bias, self.row_scale, self.offsets

    @property
    def options(self) -> tuple[Any, ...]:
        """What is no tensor."""
        return self.rho, self.normalize, self.eps

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> Inputs:
        """From what `tensors`, of which the last ones may be left out, and `options` give."""
        values: tuple[Any, ...] = (*tensors, *(None,) * (6 - len(tensors)), *options)
        return cls(*values)
