"""How Megatron-LM, unpatched, is asked for the activations that it has itself."""

from __future__ import annotations

from typing import Any

FLAGS: dict[str, dict[str, Any]] = {"swiglu": {"swiglu": True}, "gelu": {}, "relu2": {"squared-relu": True}}
"""Name of the registry -> the options that ask for it."""
PATCHED = ("moe-grouped-experts-in-norm",)
"""Options of the patched Megatron only, which are of use with these activations."""
