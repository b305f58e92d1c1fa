"""What OLMo and its megablocks have themselves, patched or not."""

NATIVE = ("swiglu", "gelu", "relu")
"""Activations."""
BLOCK_SIZE = 128
"""Rows and columns of a block of megablocks' sparse matrices, which it does not offer as a parameter."""
