"""What lets an upstream's own training loop run on a CPU with gloo; inert where CUDA is available."""

from __future__ import annotations

import importlib

import torch


def enable(upstream: str) -> None:
    """Prepare this process to run `upstream` (megatron, olmo) on the CPU; call before importing it.

    Returns at once, having changed nothing, where CUDA is available.
    """
    if torch.cuda.is_available():
        return
    importlib.import_module(f"polycom_ext.rehearsal.{upstream}").install()
