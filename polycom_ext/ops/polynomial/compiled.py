"""The plain operations under torch.compile, for a GPU that the fused ones do not serve.

Both steps are compiled at their first call, which takes seconds, and again, for any number of rows, where the
number of rows changes. Where torch.compile does not work (it needs Triton on a GPU), they run as they stand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polycom_ext.ops.calls import group_size
from polycom_ext.ops.polynomial import eager, steps
from polycom_ext.ops.polynomial.inputs import Inputs


class _Compiled:
    """A step by torch.compile, as long as that works for every step."""

    works = True

    def __init__(self, step: Callable[..., Any]) -> None:
        self._step = step

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(self._step)

    def __call__(self, *arguments: Any) -> Any:
        if _Compiled.works:
            try:
                # As no view, of which torch.compile would fix what it is a view of.
                return self._compiled(*map(_detached, arguments))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of the compiler at hand, whichever that is
                _Compiled.works = False
                reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
                said = "PolyCom runs plain torch operations, which is slower still: torch.compile failed"
                warnings.warn(f"{said} ({reason})", RuntimeWarning, stacklevel=2)
        return self._step(*arguments)


def _detached(value: Any) -> Any:
    if isinstance(value, Inputs):
        return Inputs(*map(_detached, value))
    return value.detach() if isinstance(value, Tensor) else value


COMPILED = eager.Steps(_Compiled(steps.forward), _Compiled(steps.backward))


def polynomial(inputs: Inputs, slope: Tensor | None, group: dist.ProcessGroup | None) -> Tensor:
    """As eager.polynomial, which it is for rows that are sharded: they are reduced between operations."""
    by = COMPILED if group_size(group) == 1 else eager.PLAIN
    scale = None if inputs.row_scale is None else inputs.row_scale.reshape(-1)
    rows = inputs._replace(x=inputs.x.reshape(-1, inputs.x.shape[-1]), row_scale=scale)
    return eager.polynomial(rows, slope, group, by=by).view(inputs.x.shape)
