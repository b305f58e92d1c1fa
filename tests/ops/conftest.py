"""The CUDA kernels on the CPU."""

from __future__ import annotations

import pytest

from polycom_ext.ops import build

from .emulated import Emulator


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    try:
        build.find_cxx()
    except build.BuildError as error:
        pytest.skip(str(error))
    return Emulator.compile()
