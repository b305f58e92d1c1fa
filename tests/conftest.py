"""The paths that the public functions take."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

from polycom_ext.ops.polynomial import library

# Started in the background (`nohup`, a script's `&`) the tests, and all that they start, would ignore these.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

GPU = ["cuda"] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *GPU, "eager"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The fused operations of each device, and plain torch's; new tensors are on that device."""
    name = str(request.param)
    if name == "eager":
        monkeypatch.setattr(library, "devices", frozenset())
        monkeypatch.setattr(library, "problem", "")
    elif name not in library.devices:
        pytest.skip(f"the fused operations are not there: {library.problem}")
    with torch.device("cuda" if name == "cuda" else "cpu"):
        yield name
