"""A dropless mixture of experts on `torch.nn.functional.grouped_mm`, under the names of OLMo's MoE branch.

Each token goes to its top-k experts; tokens are sorted by expert, so that an expert's tokens are consecutive
rows and one grouped matrix product serves all experts, those without a token too. Nothing is padded or
dropped. The rows between the two products are [tokens * top_k, ffn]: any activation of the registry is exact
on them. Checkpoints are those of the branch, which inherits them from megablocks:

    router.layer.weight            (experts, d_model)
    experts.mlp.w1, w2, v1         (experts * ffn, d_model); v1 only in a gated one
    experts.bias                   (d_model,), only with include_bias
    shared_expert.up_proj, …       linear layers, only with moe_shared_expert
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polycom_ext import activations
from polycom_ext.integrations.olmo.grouped import grouped_product


@dataclass(frozen=True)
class Routing:
    """What a router decided for one micro-batch: what its losses are made of."""

    tokens_per_expert: Tensor
    """(experts,), integers"""
    scores: Tensor
    """(tokens, experts), the softmax of the logits"""
    logits: Tensor
    """(tokens, experts)"""


class Router(nn.Module):
    """A linear layer, softmax, and the top-k experts of each token with their scores as weights."""

    def __init__(self, d_model: int, num_experts: int, top_k: int, device: Any = None) -> None:
        super().__init__()
        self.top_k = top_k
        self.layer = nn.Linear(d_model, num_experts, bias=False, device=device)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(tokens, d_model) -> logits and scores (tokens, experts), weights and experts (tokens, top_k)."""
        logits = self.layer(x)
        # in float32 whatever the storage type, as CUDA's autocast has it
        scores = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, experts = torch.topk(scores, self.top_k, dim=-1)
        return logits, scores, weights, experts


class ExpertMLP(nn.Module):
    """The weights of all experts: act(x w1^T) w2, or (silu(x w1^T) * x v1^T) w2 where gated."""

    def __init__(self, d_model: int, width: int, num_experts: int, gated: bool, device: Any = None) -> None:
        super().__init__()
        self.num_experts = num_experts
        shape = (num_experts * width, d_model)
        self.w1 = nn.Parameter(torch.empty(shape, device=device))
        self.w2 = nn.Parameter(torch.empty(shape, device=device))
        self.v1 = nn.Parameter(torch.empty(shape, device=device)) if gated else None

    def forward(self, rows: Tensor, ends: Tensor, act: nn.Module) -> Tensor:
        """Rows (n, d_model) sorted by expert, and where each expert's rows end (experts,), int32."""
        h = grouped_product(rows, self._each(self.w1, rows).transpose(-2, -1), ends)
        if self.v1 is None:
            h = act(h)
        else:
            h = F.silu(h) * grouped_product(rows, self._each(self.v1, rows).transpose(-2, -1), ends)
        return grouped_product(h, self._each(self.w2, rows), ends)

    def _each(self, weight: Tensor, rows: Tensor) -> Tensor:
        """(experts, ffn, d_model) in the rows' type: autocast does not know grouped_mm."""
        return weight.view(self.num_experts, -1, weight.shape[-1]).to(rows.dtype)


class Experts(nn.Module):
    """Takes tokens to their experts and back."""

    def __init__(self, mlp: ExpertMLP, bias: bool, device: Any = None) -> None:
        super().__init__()
        self.mlp = mlp
        self.bias = nn.Parameter(torch.zeros(mlp.w1.shape[-1], device=device)) if bias else None

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, act: nn.Module) -> tuple[Tensor, Tensor]:
        """x (tokens, d_model) -> the weighted sum of its experts' outputs, and the tokens that each got."""
        tokens, top_k = experts.shape
        by_expert, order = experts.flatten().sort(stable=True)
        ids = torch.arange(self.mlp.num_experts, device=x.device)
        ends = torch.searchsorted(by_expert, ids, right=True)
        outputs = self.mlp(x[order // top_k], ends.to(torch.int32), act)
        # back in the tokens' order: no sum over an index, so the result does not depend on a race
        outputs = outputs[order.argsort()].view(tokens, top_k, -1)
        y = (outputs * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)
        return y if self.bias is None else y + self.bias, ends.diff(prepend=ends.new_zeros(1))


class SharedExpert(nn.Module):
    """A dense feed-forward layer that every token passes, added to its experts' output."""

    def __init__(self, d_model: int, width: int, gated: bool, bias: bool, device: Any = None) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d_model, width, bias=bias, device=device)
        self.down_proj = nn.Linear(width, d_model, bias=bias, device=device)
        self.gate_proj = nn.Linear(d_model, width, bias=bias, device=device) if gated else None

    def forward(self, x: Tensor, act: nn.Module) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(act(up) if self.gate_proj is None else F.silu(self.gate_proj(x)) * up)


class MoE(nn.Module):
    """Router, experts and, if asked for, a shared expert. The activation is the block's, and is passed in."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        device, bias = config.init_device, config.include_bias
        gated = activations.parse(config.activation_type)[0].gated
        self.router = Router(config.d_model, config.moe_num_experts, config.moe_top_k, device)
        mlp = ExpertMLP(config.d_model, width, config.moe_num_experts, gated, device)
        self.experts = Experts(mlp, bias, device)
        self.shared_expert = (
            SharedExpert(config.d_model, width, gated, bias, device) if config.moe_shared_expert else None
        )
        self.routing: Routing | None = None
        """Of the last forward pass in training mode, until its losses are taken."""

    def forward(self, x: Tensor, act: nn.Module) -> Tensor:
        shape, device = x.shape, x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        x = x.reshape(-1, shape[-1])
        logits, scores, weights, experts = self.router(x)
        y, tokens_per_expert = self.experts(x, weights, experts, act)
        if self.training:
            self.routing = Routing(tokens_per_expert, scores, logits)
        if self.shared_expert is not None:
            y = y + self.shared_expert(x, act)
        return y.view(shape)
