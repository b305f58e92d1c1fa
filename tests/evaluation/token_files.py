"""Token files of one document, in any form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from polycom_ext import trainers
from polycom_ext.data.formats import Tokens

LENGTH, COUNT = 32, 5
"""Of windows in `ids`."""


def written(prefix: Path, form: str, ids: Any) -> Path:
    """A data set of one document."""
    lengths = np.array([len(ids)], np.int32)
    held = Tokens("<u2", 1, lambda: iter([ids.astype("<u2")]), lambda: iter([lengths]))
    for suffix, write in trainers.token_format(form).files.items():
        with Path(f"{prefix}{suffix}").open("wb") as file:
            write(held, file)
    return prefix
