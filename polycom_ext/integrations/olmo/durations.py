"""Lengths as OLMo's configuration has them: steps, tokens (`2e11T`) or epochs (`1ep`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any


def tokens_a_step(options: Mapping[str, Any]) -> int | None:
    """Tokens in a global batch; None where the options do not say."""
    batch, model = options.get("global_train_batch_size"), options.get("model")
    length = model.get("max_sequence_length") if isinstance(model, dict) else None
    if isinstance(batch, int) and isinstance(length, int) and batch * length > 0:
        return batch * length
    return None


def steps(options: Mapping[str, Any], duration: Any) -> int | None:
    """A duration in steps; None for one in epochs, which needs the data to be counted."""
    if isinstance(duration, int) or re.fullmatch(r"\d+", str(duration)):
        return int(duration)
    tokens = re.fullmatch(r"\s*([\d.]+(?:[eE]\+?\d+)?)\s*T", str(duration))
    a_step = tokens_a_step(options)
    return math.ceil(int(float(tokens[1])) / a_step) if tokens and a_step else None
