"""The activations that OLMo builds itself, patched or not."""

NATIVE = ("swiglu", "gelu", "relu")
