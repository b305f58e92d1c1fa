"""PolyCom for pre-training: polynomial composition activations for Megatron-LM and OLMo."""

from polycom_ext._version import __version__ as __version__
from polycom_ext.activations import PolyNorm, PolyPReLU, PolyReLU, PolyReLUNorm, build
from polycom_ext.functional import (
    poly_norm,
    poly_norm_linear,
    poly_prelu,
    poly_relu,
    poly_relu_linear,
    poly_relu_norm,
)

__all__ = [
    "PolyNorm",
    "PolyPReLU",
    "PolyReLU",
    "PolyReLUNorm",
    "build",
    "poly_norm",
    "poly_norm_linear",
    "poly_prelu",
    "poly_relu",
    "poly_relu_linear",
    "poly_relu_norm",
]
