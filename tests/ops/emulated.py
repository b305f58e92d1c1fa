"""Runs the CUDA kernels' own source on CPU tensors, by block_emulator.h."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from polycom_ext.ops import build
from polycom_ext.ops.polynomial.inputs import Inputs
from polycom_ext.ops.polynomial.quantized import Target, scale_shape

SOURCES = build.FAMILIES["polynomial"] / "csrc"
WHOLE, REDUCE, APPLY = 0, 1, 2
MOST_SHARED = 163 * 1024
"""Bytes of shared memory that a block may have on an A100; others that the kernels are made for have more."""
_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Problem(ctypes.Structure):
    """polycom::Problem of arguments.h, field by field, as are the structures below."""

    _fields_ = (
        ("storage", ctypes.c_int),
        ("order", ctypes.c_int),
        ("rectify", ctypes.c_bool),
        ("normalize", ctypes.c_bool),
        ("step", ctypes.c_int),
        ("eps", ctypes.c_float),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("inverse_width", ctypes.c_float),
    )


class Parameters(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("pre_bias", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("experts", ctypes.c_int),
        ("pre_bias_per_expert", ctypes.c_bool),
    )


class ForwardArguments(ctypes.Structure):
    _fields_ = (
        ("problem", Problem),
        ("parameters", Parameters),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("power_sums", ctypes.c_void_p),
    )


class Quantization(ctypes.Structure):
    """Of quantized_arguments.h."""

    _fields_ = (
        ("recipe", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("inverses", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("largest", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("power_of_two", ctypes.c_bool),
        ("swizzled", ctypes.c_bool),
    )


class QuantizedArguments(ctypes.Structure):
    _fields_ = (("forward", ForwardArguments), ("quantization", Quantization))


class BackwardArguments(ctypes.Structure):
    _fields_ = (
        ("problem", Problem),
        ("parameters", Parameters),
        ("x", ctypes.c_void_p),
        ("grad_y", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("grad_x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("dots", ctypes.c_void_p),
        ("grad_row_scale", ctypes.c_void_p),
        ("terms", ctypes.c_void_p),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


class Emulator:
    """The operations of operators.h with the same meaning, by emulated CUDA kernels."""

    def __init__(self, library: Path, max_blocks: int = 3) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.set_most_shared(MOST_SHARED)
        self._library.chosen_shape.restype = ctypes.c_char_p
        self._max_blocks = ctypes.c_int64(max_blocks)

    @classmethod
    def compile(cls) -> Emulator:
        """Compile into build/, or take what lies there of the same sources.

        Without optimisation, which would take three times as long and gain nothing on so few rows.
        """
        here = Path(__file__).parent
        digest = hashlib.sha256(build.sources_digest(SOURCES).encode())
        for source in (here / "block_emulator.h", here / "emulated_kernels.cpp"):
            digest.update(source.read_bytes())
        library = here.parents[1] / "build" / f"emulated_kernels-{digest.hexdigest()[:16]}.so"
        if library.exists():
            return cls(library)
        flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-fno-strict-aliasing", "-w"]
        include = [f"-I{here}", f"-I{SOURCES}"]
        library.parent.mkdir(exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        build.run(
            [build.find_cxx(), *flags, *include, str(here / "emulated_kernels.cpp"), "-o", str(partial)]
        )
        partial.replace(library)
        return cls(library)

    @property
    def shape(self) -> str:
        """The instance that the last call chose."""
        return str(self._library.chosen_shape().decode())

    @contextmanager
    def with_shared_memory(self, most: int) -> Iterator[None]:
        """As on a GPU whose blocks may have that many bytes of it."""
        self._library.set_most_shared(most)
        try:
            yield
        finally:
            self._library.set_most_shared(MOST_SHARED)

    def _problem(
        self, x: Tensor, order: int, rho: int, normalize: bool, step: int, eps: float, width: int | None
    ) -> Problem:
        rows, own_width = x.shape
        inverse = 1.0 / (width or own_width)
        return Problem(_STORAGE[x.dtype], order, rho == 1, normalize, step, eps, rows, own_width, inverse)

    def _parameters(
        self,
        weight: Tensor,
        bias: Tensor,
        pre_bias: Tensor | None,
        row_scale: Tensor | None,
        offsets: Tensor | None,
    ) -> Parameters:
        per_expert = pre_bias is not None and pre_bias.dim() == 2
        pointers = (_pointer(t) for t in (weight, bias, pre_bias, row_scale, offsets))
        return Parameters(*pointers, bias.numel(), per_expert)

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, pre_bias: Tensor | None, row_scale: Tensor | None,
        offsets: Tensor | None, rho: int, normalize: bool, eps: float, *, step: int = WHOLE,
        power_sums: Tensor | None = None, total_width: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(y, scales); with step REDUCE only power_sums is written."""
        order = weight.shape[-1]
        y, scales = torch.empty_like(x), torch.empty(x.shape[0] if normalize else 0, order)
        problem = self._problem(x, order, rho, normalize, step, eps, total_width)
        parameters = self._parameters(weight, bias, pre_bias, row_scale, offsets)
        pointers = (_pointer(t) for t in (x, y, scales, power_sums))
        arguments = ForwardArguments(problem, parameters, *pointers)
        self._library.run_forward(ctypes.byref(arguments), self._max_blocks)
        return y, scales

    def quantized(self, inputs: Inputs, target: Target) -> Tensor:
        """polynomial_quantized: fills target and returns the row statistics."""
        x, weight, bias, _, row_scale, offsets, rho, normalize, eps = inputs
        scales = torch.empty(x.shape[0] if normalize else 0, inputs.order)
        problem = self._problem(x, inputs.order, rho, normalize, WHOLE, eps, None)
        parameters = self._parameters(weight, bias, None, row_scale, offsets)
        forward = ForwardArguments(problem, parameters, _pointer(x), None, _pointer(scales), None)
        pointers = (_pointer(t) for t in (target.data, target.scale_inv, target.scale, target.amax))
        stride = scale_shape(target.recipe, *x.shape)[-1]
        options = (stride, target.epsilon, target.power_of_two, target.swizzled)
        arguments = QuantizedArguments(forward, Quantization(int(target.recipe), *pointers, *options))
        self._library.run_quantized(ctypes.byref(arguments), self._max_blocks)
        return scales

    def backward(
        self, grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scales: Tensor,
        pre_bias: Tensor | None, row_scale: Tensor | None, offsets: Tensor | None, rho: int, normalize: bool,
        recompute: bool, *, step: int = WHOLE, dots: Tensor | None = None, total_width: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """(grad_x, grad_coefficients, grad_row_scale, y); with step REDUCE only dots is written."""
        order = weight.shape[-1]
        grad_x = torch.empty_like(x)
        coefficients = torch.empty(bias.numel(), order + 1)
        y = torch.empty_like(x) if recompute else None
        grad_row_scale = None if row_scale is None else torch.empty(x.shape[0])
        problem = self._problem(x, order, rho, normalize, step, 0.0, total_width)
        parameters = self._parameters(weight, bias, pre_bias, row_scale, offsets)
        tensors = (x, grad_y, scales, grad_x, y, dots, grad_row_scale, None)
        arguments = BackwardArguments(problem, parameters, *(_pointer(t) for t in tensors))
        self._library.run_backward(
            ctypes.byref(arguments), ctypes.c_void_p(coefficients.data_ptr()), self._max_blocks
        )
        return grad_x, coefficients, grad_row_scale, y
