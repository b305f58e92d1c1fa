"""What Transformer Engine's compiled module has a GPU do, by torch: under its names, with its parameters.

`make test-te` holds the names and parameters against the real module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.integrations.transformer_engine.fp8 import plain

Tensors = list[list[Tensor]]
"""Of a multi-tensor kernel: lists of equal length, as gradients, parameters, …"""


def generic_gemm(
    A: Tensor,
    transA: bool,
    B: Tensor,
    transB: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    *rest: Any,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    """D = op(B) op(A), matrices of rows: what cuBLAS, column by column, calls op(A) op(B)."""
    A, B = plain(A), plain(B)
    # Bytes that were gathered say float32, whatever type they stand for.
    dtype = min(A.dtype, B.dtype, key=lambda one: one.itemsize)
    A, B = A.to(dtype), B.to(dtype)
    a, b = A.reshape(-1, A.shape[-1]), B.reshape(-1, B.shape[-1])
    out = (b.T if transB else b) @ (a.T if transA else a)
    if not transB:
        out = out.reshape(*B.shape[:-1], out.shape[-1])
    if bias is not None and not grad:
        out = out + bias
    if D is not None:
        out = D.add_(out) if accumulate else D.copy_(out)
    return out, b.sum(dim=0) if grad and bias is not None else None, None, None


def te_general_grouped_gemm(
    A: list[Tensor],
    transa: bool,
    B: list[Tensor],
    transb: bool,
    D: list[Tensor] | None,
    D_type: Any,
    m_splits: list[int],
    bias: list[Tensor],
    bias_type: Any,
    single_output: bool,
    pre_gelu_out: list[Tensor],
    grad: bool,
    workspace: Any,
    workspaceSize: int,
    accumulate: bool,
    *rest: Any,
) -> list[Tensor]:
    """A product for each of the lists' places; in `single_output` the results lie one after the other."""
    assert D is not None
    outs = list(D[0].split(m_splits)) if single_output else D
    for a, b, out, one in zip(map(plain, A), map(plain, B), outs, bias, strict=True):
        product = (b.T if transb else b) @ (a.T if transa else a)
        if one.numel():
            if grad:
                one.copy_(b.sum(dim=0))
            else:
                product = product + one
        out.add_(product) if accumulate else out.copy_(product)
    return bias


def layernorm_fwd(
    input: Tensor, weight: Tensor, bias: Tensor, eps: float, ln_out: Any, quantizer: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mean = input.mean(dim=-1)
    rstd = (input.var(dim=-1, unbiased=False) + eps).rsqrt()
    out = (input - mean[:, None]) * rstd[:, None] * weight + bias
    return out if quantizer is None else quantizer(out), mean, rstd


def layernorm_bwd(
    dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    normal, scaled = (x - mu[:, None]) * rsigma[:, None], dz * gamma
    dots = (scaled * normal).mean(dim=-1, keepdim=True)
    dx = (scaled - scaled.mean(dim=-1, keepdim=True) - normal * dots) * rsigma[:, None]
    return dx, (dz * normal).sum(dim=0), dz.sum(dim=0)


def rmsnorm_fwd(
    input: Tensor, weight: Tensor, eps: float, ln_out: Any, quantizer: Any, *rest: Any
) -> tuple[Tensor, None, Tensor]:
    rstd = (input.square().mean(dim=-1) + eps).rsqrt()
    out = input * rstd[:, None] * weight
    return out if quantizer is None else quantizer(out), None, rstd


def rmsnorm_bwd(dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    normal, scaled = x * rsigma[:, None], dz * gamma
    dots = (scaled * normal).mean(dim=-1, keepdim=True)
    return (scaled - normal * dots) * rsigma[:, None], (dz * normal).sum(dim=0)


def bgrad_quantize(input: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    return input.sum(dim=tuple(range(input.dim() - 1))), quantizer(input)


def get_cublasLt_version() -> int:
    """Before grouped tensors: TE then multiplies part by part, as te_general_grouped_gemm does."""
    return 0


def fused_multi_row_padding(
    input: Tensor, output: Tensor, input_row_list: list[int], padded_input_row_list: list[int]
) -> None:
    """Each part in its padded place, and zeros behind it."""
    output.zero_()
    for part, place in zip(input.split(input_row_list), output.split(padded_input_row_list), strict=True):
        place[: len(part)] = part


def fused_multi_row_unpadding(
    input: Tensor, output: Tensor, input_row_list: list[int], unpadded_input_row_list: list[int]
) -> None:
    for place, part in zip(input.split(input_row_list), output.split(unpadded_input_row_list), strict=True):
        part.copy_(place[: len(part)])


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Tensors, per_tensor: bool | None = None
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([one.norm() for one in tensor_lists[0]])
    return norms.norm().view(1), norms if per_tensor else norms.new_empty(0)


def multi_tensor_scale(
    chunk_size: int, is_infinite: Tensor, tensor_lists: Tensors, scale: float | Tensor
) -> None:
    for one, out in zip(*tensor_lists, strict=True):
        out.copy_(one * scale)


def multi_tensor_scale_tensor(
    chunk_size: int, is_infinite: Tensor, tensor_lists: Tensors, scale: Tensor
) -> None:
    multi_tensor_scale(chunk_size, is_infinite, tensor_lists, scale)


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Tensors,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    assert mode == 1  # AdamW
    assert bias_correction == 1
    for gradient, parameter, first, second in zip(*tensor_lists, strict=True):
        first.lerp_(gradient, 1 - beta1)
        second.lerp_(gradient.square(), 1 - beta2)
        root = (second / (1 - beta2**step)).sqrt() + epsilon
        parameter.sub_(lr * (first / (1 - beta1**step) / root + weight_decay * parameter))


def compute_grouped_dbias(
    dy: Tensor, offsets: Tensor, num_groups: int, dbias: Tensor | None = None
) -> Tensor:
    parts = dy.float().split(offsets.diff().tolist())
    sums = torch.stack([part.sum(dim=0) for part in parts])
    return sums if dbias is None else dbias.add_(sums)


def compute_grouped_dbias_dscales(
    dy: Tensor,
    scales: Tensor,
    bias: Tensor,
    offsets: Tensor,
    dbias: Tensor | None = None,
    dscales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows = bias.float().repeat_interleave(offsets.diff(), dim=0)
    dots = (dy.float() * rows).sum(dim=-1)
    scaled = dy.float() * scales.unsqueeze(-1)
    dscales = dots if dscales is None else dscales.add_(dots)
    return compute_grouped_dbias(scaled, offsets, len(bias), dbias), dscales


TRITON = (compute_grouped_dbias, compute_grouped_dbias_dscales)
"""Of transformer_engine.pytorch.triton.grouped_dbias_dscales, from TE 2.17 on."""
KERNELS = (
    generic_gemm,
    te_general_grouped_gemm,
    layernorm_fwd,
    layernorm_bwd,
    rmsnorm_fwd,
    rmsnorm_bwd,
    bgrad_quantize,
    get_cublasLt_version,
    fused_multi_row_padding,
    fused_multi_row_unpadding,
    multi_tensor_l2norm,
    multi_tensor_scale,
    multi_tensor_scale_tensor,
    multi_tensor_adam,
)
