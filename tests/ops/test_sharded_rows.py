"""Rows sharded over two processes are the function of the whole row: results, gradients, variants."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RANK_PROGRAM = """
import sys
import torch, torch.distributed as dist
from polycom_ext import functional, modules
from polycom_ext.ops.polynomial import fused, library

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
group = dist.group.WORLD
torch.manual_seed(0)
x, grad = torch.randn(7, 64), torch.randn(7, 64)
x[3] *= 1e12
offsets = torch.tensor([2, 6])
own = slice(32 * rank, 32 * rank + 32)

def close(actual, expected):
    ratio = float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
    assert ratio < 1e-5, ratio

for function in (functional.poly_norm, functional.poly_relu_norm, functional.poly_relu):
    for variants in (False, True):
        if function is functional.poly_relu:
            x = x.clamp(-3, 3)
        x[6], grad[6] = (torch.nan, torch.nan) if variants else (1, 1)  # a row of nobody's, with offsets
        experts = (2,) if variants else ()
        whole = [x, torch.randn(*experts, 3), torch.randn(*experts, 1)]
        extra = [torch.randn(64), torch.rand(7)] if variants else []
        shard = [x[:, own], *whole[1:], *([extra[0][own], extra[1]] if variants else [])]
        whole = [t.clone().requires_grad_() for t in whole + extra]
        shard = [t.clone().requires_grad_() for t in shard]
        results = []
        for tensors, on in ((whole, None), (shard, group)):
            keywords = dict(zip(("pre_bias", "row_scale"), tensors[3:]))
            if variants:
                keywords["offsets"] = offsets
            results.append(function(*tensors[:3], group=on, **keywords))
        results[0].backward(grad)
        results[1].backward(grad[:, own])
        close(results[1].detach(), results[0].detach()[:, own])
        close(shard[0].grad, whole[0].grad[:, own])
        close(shard[1].grad, whole[1].grad)
        close(shard[2].grad, whole[2].grad)
        if variants:
            close(shard[3].grad, whole[3].grad[own])
            dist.all_reduce(shard[4].grad)  # its gradient is each rank's own share
            close(shard[4].grad, whole[4].grad)

for module in (modules.PolyNorm(), modules.PolyReLU()) if library.devices else ():
    x, grad, extra = torch.randn(7, 32), torch.randn(7, 64), (torch.randn(32), torch.rand(7))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, *extra)]
    module.group = group
    y = module(leaves[0], pre_bias=leaves[1], row_scale=leaves[2])
    expected = torch.autograd.grad(y, (leaves[0], *module.parameters(), *leaves[1:]), grad[:, own])
    inputs = module.inputs(x, pre_bias=extra[0], row_scale=extra[1])
    by_hand, scales = fused.forward(inputs, group)
    found, again = fused.backward(inputs, scales, grad[:, own], group, recompute=True)
    assert torch.equal(by_hand, y) and torch.equal(again, y)
    assert all(torch.equal(*pair) for pair in zip(found[:5], expected, strict=True))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("path", ["dispatched", "eager"])
def test_two_ranks_are_one(path: str, tmp_path: Path) -> None:
    environment = (
        os.environ | {"OMP_NUM_THREADS": "1"} | ({"POLYCOM_OPS": "eager"} if path == "eager" else {})
    )
    command = [sys.executable, "-c", RANK_PROGRAM]
    store = str(tmp_path / "store")
    ranks = [
        subprocess.Popen([*command, str(rank), store], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
