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


class _Compiled:
    """A step by torch.compile, as long as that works for every step."""

    works = True

    def __init__(self, step: Callable[..., Any]) -> None:
        self._step = step

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(self._step)

    def __call__(self, *inputs: Any) -> Any:
        if _Compiled.works:
            try:
                # As no view, of which torch.compile would fix what it is a view of.
                return self._compiled(*(i.detach() if isinstance(i, Tensor) else i for i in inputs))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of the compiler at hand, whichever that is
                _Compiled.works = False
                reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
                said = "PolyCom runs plain torch operations, which is slower still: torch.compile failed"
                warnings.warn(f"{said} ({reason})", RuntimeWarning, stacklevel=2)
        return self._step(*inputs)


COMPILED = eager.Steps(_Compiled(steps.forward), _Compiled(steps.backward))


def polynomial(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    group: dist.ProcessGroup | None,
    row_scale: Tensor | None,
    **options: Any,
) -> Tensor:
    """As eager.polynomial, which it is for rows that are sharded: they are reduced between operations."""
    by = COMPILED if group_size(group) == 1 else eager.PLAIN
    if row_scale is not None:
        row_scale = row_scale.reshape(-1)
    rows = x.reshape(-1, x.shape[-1])
    return eager.polynomial(rows, weight, bias, group=group, row_scale=row_scale, by=by, **options).view(
        x.shape
    )
