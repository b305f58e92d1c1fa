"""Losses on token files, over the windows that a trainer makes of them.

With L the window's length, a file of n tokens has (n − 1) // L windows of L + 1 tokens, or n // L of L, as
its form's trainer reads them (`TokenFormat.shared`); what is left at the end belongs to none. The loss is the
mean of −ln p(token | those before it in its window), in nats a token, over all targets of all windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polycom_ext.data import formats
from polycom_ext.errors import PolycomError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Windows:
    """A token file, cut."""

    tokens: npt.NDArray[Any]
    length: int
    shared: int

    @property
    def count(self) -> int:
        return (len(self.tokens) - self.shared) // self.length

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        start = index * self.length
        return self.tokens[start : start + self.length + self.shared].astype(np.int64)


def windows(path: Path, length: int, vocab_size: int, option: str = "--window") -> Windows:
    """Raises PolycomError for what is no token file, of another vocabulary, or shorter than a window.

    Args:
        option: of the command line, by which `length` is given.
    """
    prefix, form = formats.found(path)
    assert form.read is not None
    made = Windows(form.read(prefix, vocab_size), length, form.shared)
    if made.count < 1:
        raise PolycomError(
            f"{path} holds {len(made.tokens)} tokens, less than a window of {length + form.shared}; "
            f"name a smaller {option}"
        )
    return made


def measure(model: nn.Module, cut: Windows, limit: int | None, batch_size: int) -> dict[str, Any]:
    """Loss and perplexity, on every rank, which share the windows among them.

    Returns: {"loss": nats a token, "perplexity": exp of it, "windows": …, "tokens": targets}
    """
    import torch
    import torch.distributed as dist
    from torch.nn.functional import cross_entropy

    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    count = min(cut.count, limit or cut.count)
    device = next(model.parameters()).device
    own = range(rank, count, ranks)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.inference_mode():
        for first in range(0, len(own), batch_size):
            batch = torch.from_numpy(np.stack([cut[index] for index in own[first : first + batch_size]])).to(
                device
            )
            logits = model(batch[:, :-1], use_cache=False).logits.float()
            losses = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            sums += torch.stack((losses.double().sum(), torch.tensor(losses.numel(), device=device)))
    if ranks > 1:
        dist.all_reduce(sums)
    loss = float(sums[0] / sums[1])
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "windows": count, "tokens": int(sums[1])}
