"""The routers' auxiliary losses, as OLMo's MoE branch and its fork of megablocks compute them.

With L layers, E experts, T tokens of a micro-batch on this rank, top-k routing, n_e tokens routed to expert e
and s_te the softmax of the logits z_te:

    load-balancing loss = moe_loss_weight * E / (L T k) * sum_layers sum_e n_e mean_t(s_te)
    z-loss              = moe_zloss_weight / (L T k) * sum_layers sum_t logsumexp_e(z_te)^2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polycom_ext.integrations.olmo.experts import MoE, Routing


def load_balancing_loss(routings: Sequence[Routing], top_k: int, in_fp32: bool = False) -> Tensor:
    """E / (L T k) * sum n_e mean_t(s_te): 1 where tokens and scores are spread evenly."""
    total = routings[0].scores.new_zeros(())
    for routing in routings:
        scores = routing.scores.float() if in_fp32 else routing.scores
        total = total + torch.dot(routing.tokens_per_expert.to(scores.dtype), scores.mean(dim=0))
    tokens, experts = routings[0].scores.shape
    return total * (experts / (len(routings) * tokens * top_k))


def z_loss(routings: Sequence[Routing], top_k: int, in_fp32: bool = False) -> Tensor:
    """1 / (L T k) * sum logsumexp(z_t)^2."""
    total = routings[0].scores.new_zeros(())
    for routing in routings:
        logits = routing.logits.to(torch.float32 if in_fp32 else routing.scores.dtype)
        total = total + logits.logsumexp(dim=-1).square().sum()
    return total / (len(routings) * routings[0].scores.shape[0] * top_k)


class RouterLosses:
    """Gathers the losses of a model's routers over the micro-batches of a step, for OLMo's Trainer."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.layers = [module for module in model.modules() if isinstance(module, MoE)]
        self._start()

    def _start(self) -> None:
        self.load_balancing: Tensor | None = None
        self.z: Tensor | None = None
        self.tokens_per_expert: Tensor | None = None

    def micro_batch(self, num_micro_batches: int) -> Tensor:
        """What to add to the loss of the micro-batch that just went forward."""
        routings = [layer.routing for layer in self.layers if layer.routing is not None]
        for layer in self.layers:
            layer.routing = None
        config = self.config
        loss = torch.zeros((), device=routings[0].scores.device)
        if config.moe_loss_weight:
            part = load_balancing_loss(routings, config.moe_top_k, config.moe_lbl_in_fp32)
            part = part * (config.moe_loss_weight / num_micro_batches)
            self.load_balancing = _add(self.load_balancing, part)
            loss = loss + part
        if config.moe_zloss_weight:
            part = z_loss(routings, config.moe_top_k, config.moe_lbl_in_fp32)
            part = part * (config.moe_zloss_weight / num_micro_batches)
            self.z = _add(self.z, part)
            loss = loss + part
        if config.moe_log_expert_assignment:
            counts = torch.stack([routing.tokens_per_expert for routing in routings])
            self.tokens_per_expert = _add(self.tokens_per_expert, counts)
        return loss

    def batch(self, reduce: bool) -> dict[str, float]:
        """The step's metrics under the branch's names; with `reduce`, the mean over ranks on rank 0."""
        metrics: dict[str, float] = {}
        for name, value in (("LoadBalancingLoss", self.load_balancing), ("MoEZLoss", self.z)):
            if value is not None:
                if reduce:
                    dist.reduce(value, 0)
                    value = value / dist.get_world_size()
                metrics[f"train/{name}"] = value.item()
        if self.tokens_per_expert is not None and reduce:
            dist.reduce(self.tokens_per_expert, 0)
            for layer, counts in enumerate(self.tokens_per_expert.tolist()):
                for expert, count in enumerate(counts):
                    metrics[f"train/TokensPercentage/layer{layer}/expert{expert}"] = 100 * count / sum(counts)
                    metrics[f"train/TokensTotal/layer{layer}/expert{expert}"] = count
        self._start()
        return metrics


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part.detach().clone() if total is None else total + part.detach()
