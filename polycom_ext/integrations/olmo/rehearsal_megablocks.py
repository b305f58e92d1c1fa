"""CPU stand-ins for the kernels under megablocks' Python: stk, megablocks_ops, grouped_gemm, and its own.

The fork that OLMo's MoE branch uses runs as it is on top of them: routing, layouts, losses, layers. They do
what the kernels do, for sizes that a CPU can take. A token's k-th assignment has the index
`token * top_k + k`; `indices` lists the assignments in the order of their experts' bins.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def install() -> None:
    """Put the stand-ins where megablocks will look for them; call before importing it."""
    autocast = _module("stk.backend.autocast", custom_fwd=_as_it_is, custom_bwd=_as_it_is)
    backend = _module("stk.backend", autocast=autocast)
    stk_ops = _module("stk.ops", sdd=sdd, dsd=dsd, mul=mul, row_indices=row_indices)
    _module("stk", Matrix=Matrix, ops=stk_ops, backend=backend)
    _module(
        "megablocks_ops",
        exclusive_cumsum=exclusive_cumsum,
        inclusive_cumsum=inclusive_cumsum,
        histogram=histogram,
        indices=block_columns,
        sort=sort,
    )
    gemm = _module("grouped_gemm.ops", gmm=gmm)
    _module("grouped_gemm", ops=gemm, backend=gemm)
    kernels = (gather, scatter, scatter_wgrad, padded_gather, padded_scatter, padded_scatter_wgrad)
    binned = (binned_gather, binned_scatter, binned_scatter_wgrad)
    _module("megablocks.backend.kernels", **{kernel.__name__: kernel for kernel in (*kernels, *binned)})
    _import_arguments()


def _import_arguments() -> None:
    """megablocks/layers/arguments.py asks for the current CUDA device while it is imported."""
    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: 0
    try:
        import_module("megablocks.layers.arguments")
    finally:
        torch.cuda.current_device = current_device


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
    return module


def _as_it_is(function: Any) -> Any:
    return function


@dataclass(frozen=True)
class Matrix:
    """stk.Matrix: a block-sparse matrix, its nonzero blocks in `data`, (blocks, b, b)."""

    shape: tuple[int, int]
    data: Tensor
    row_indices: Tensor
    column_indices: Tensor
    offsets: Tensor
    column_indices_t: Tensor
    offsets_t: Tensor
    block_offsets_t: Tensor

    def size(self) -> tuple[int, int]:
        return self.shape

    def with_data(self, data: Tensor) -> Matrix:
        """The same topology with other blocks."""
        topology = (self.row_indices, self.column_indices, self.offsets)
        transposed = (self.column_indices_t, self.offsets_t, self.block_offsets_t)
        return Matrix(self.shape, data, *topology, *transposed)


def sdd(a: Tensor, b: Tensor, topology: Matrix) -> Matrix:
    """The blocks of a b that the topology has; a and b are dense."""
    block = topology.data.shape[-1]
    rows = a.view(-1, block, a.shape[1])[topology.row_indices.long()]
    columns = b.t().reshape(-1, block, a.shape[1])[topology.column_indices.long()]
    return topology.with_data(rows @ columns.transpose(1, 2).to(rows.dtype))


def dsd(a: Matrix, b: Tensor) -> Tensor:
    """a b for a block-sparse a and a dense b."""
    block = a.data.shape[-1]
    products = a.data @ b.view(-1, block, b.shape[1])[a.column_indices.long()].to(a.data.dtype)
    result = products.new_zeros(a.shape[0] // block, block, b.shape[1])
    return result.index_add(0, a.row_indices.long(), products).view(a.shape[0], b.shape[1])


def mul(a: Matrix, b: Matrix) -> Matrix:
    """Elementwise, for equal topologies."""
    return a.with_data(a.data * b.data)


def row_indices(shape: tuple[int, int], data: Tensor, offsets: Tensor, column_indices: Tensor) -> Tensor:
    """The block-row of each nonzero block, from where the rows begin."""
    counts = offsets.diff().long()
    return torch.arange(counts.numel()).repeat_interleave(counts).to(torch.int16)


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(x.cumsum(dim))


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(x.cumsum(dim) - x)


def histogram(x: Tensor, num_bins: int) -> Tensor:
    return torch.bincount(x.flatten().long(), minlength=num_bins).to(torch.int32)


def sort(x: Tensor, end_bit: int, sorted_out: Tensor, order_out: Tensor) -> None:
    """A stable radix sort: values and where they were."""
    values, order = x.sort(stable=True)
    sorted_out.copy_(values)
    order_out.copy_(order)


def block_columns(padded_bins: Tensor, block: int, block_rows: int, columns: int, out: Tensor) -> None:
    """Column of each nonzero block: an expert's rows have the `columns` blocks of that expert's features."""
    first_rows = torch.arange(block_rows) * block
    expert = torch.searchsorted(padded_bins.long(), first_rows, right=True)
    out.copy_((expert[:, None] * columns + torch.arange(columns)).flatten())


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """Consecutive rows of a, as many as batch_sizes says, times the matrices of b in turn."""
    parts = zip(a.split(batch_sizes.tolist()), b, strict=True)
    return torch.cat([rows @ (weight.t() if trans_b else weight).to(rows.dtype) for rows, weight in parts])


def gather(
    x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int
) -> Tensor:
    """Tokens (or their gradients, weighted) to the experts' order."""
    rows = x[indices.long() // top_k]
    return rows if weights is None else rows * weights.view(-1)[indices.long(), None].to(rows.dtype)


def scatter(
    x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int
) -> Tensor:
    """The weighted sum of each token's top_k rows, back in the tokens' order."""
    if weights is not None:
        x = x * weights.view(-1)[indices.long(), None].to(x.dtype)
    rows = torch.empty_like(x)
    rows[indices.long()] = x
    return rows.view(-1, top_k, x.shape[1]).sum(dim=1)


def scatter_wgrad(
    x: Tensor, grad: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int
) -> Tensor:
    """The gradient of the weights: each row's product with its token's gradient."""
    out = x.new_empty(indices.numel())
    out[indices.long()] = (x * grad[indices.long() // top_k]).sum(dim=-1)
    return out


def _padded_rows(bin_ids: Tensor, bins: Tensor, padded_bins: Tensor) -> Tensor:
    """Where the assignments go when each bin begins at a multiple of the block size."""
    expert = bin_ids.long()
    begins, padded_begins = (torch.cat([b.new_zeros(1), b[:-1]]).long() for b in (bins, padded_bins))
    return torch.arange(expert.numel()) - begins[expert] + padded_begins[expert]


def padded_gather(
    x: Tensor,
    indices: Tensor,
    bin_ids: Tensor,
    weights: Tensor | None,
    bins: Tensor,
    padded_bins: Tensor,
    top_k: int,
) -> Tensor:
    out = x.new_zeros(int(padded_bins[-1]), x.shape[1])
    out[_padded_rows(bin_ids, bins, padded_bins)] = gather(x, indices, bin_ids, weights, bins, top_k)
    return out


def padded_scatter(
    x: Tensor,
    indices: Tensor,
    bin_ids: Tensor,
    weights: Tensor | None,
    bins: Tensor,
    padded_bins: Tensor,
    top_k: int,
) -> Tensor:
    return scatter(x[_padded_rows(bin_ids, bins, padded_bins)], indices, bin_ids, weights, bins, top_k)


def padded_scatter_wgrad(
    x: Tensor, grad: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, padded_bins: Tensor, top_k: int
) -> Tensor:
    rows = x[_padded_rows(bin_ids, bins, padded_bins)]
    return scatter_wgrad(rows, grad, indices, bin_ids, bins, top_k)


def _slots(indices: Tensor, bins: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert, slot and index of the assignments that fit into the experts' capacity."""
    place = torch.arange(indices.numel())
    expert = torch.searchsorted(bins.long(), place, right=True)
    slot = place - torch.cat([bins.new_zeros(1), bins[:-1]]).long()[expert]
    kept = slot < capacity
    return expert[kept], slot[kept], indices.long()[kept]


def binned_gather(
    x: Tensor, indices: Tensor, weights: Tensor | None, bins: Tensor, capacity: int, top_k: int
) -> Tensor:
    expert, slot, index = _slots(indices, bins, capacity)
    rows = x[index // top_k]
    if weights is not None:
        rows = rows * weights.view(-1)[index, None].to(rows.dtype)
    out = x.new_zeros(bins.numel(), capacity, x.shape[1])
    out[expert, slot] = rows
    return out


def binned_scatter(x: Tensor, indices: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    expert, slot, index = _slots(indices, bins, x.shape[1])
    rows = x[expert, slot]
    if weights is not None:
        rows = rows * weights.view(-1)[index, None].to(rows.dtype)
    out = x.new_zeros(indices.numel(), x.shape[2])
    out[index] = rows
    return out.view(-1, top_k, x.shape[2]).sum(dim=1)


def binned_scatter_wgrad(x: Tensor, grad: Tensor, indices: Tensor, bins: Tensor, top_k: int) -> Tensor:
    expert, slot, index = _slots(indices, bins, x.shape[1])
    out = x.new_zeros(indices.numel())
    out[index] = (x[expert, slot] * grad[index // top_k]).sum(dim=-1)
    return out
