"""The MoE block of OLMo 0.6.0: OLMo's sequential block with a mixture of experts as feed-forward part."""

from __future__ import annotations

import math
from typing import Any

from olmo.config import InitFnType, ModelConfig
from olmo.initialization import init_normal
from olmo.model import BufferCache, OLMoSequentialBlock
from torch import Tensor, nn

from polycom_ext.integrations.olmo.experts import MoE


class OLMoEBlock(OLMoSequentialBlock):
    """x + MoE(norm(x + attention(norm(x)))), or with the norms after, as `norm_after` says.

    `act` is the block's, as in a dense one: all experts share it, and it is trained and saved once.
    """

    def __init__(self, layer_id: int, config: ModelConfig, cache: BufferCache) -> None:
        super().__init__(layer_id, config, cache)
        self.ffn_width = int(self.act.output_multiplier * self.hidden_size)
        self.ffn = MoE(config, self.ffn_width)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn(x, self.act)

    def reset_parameters(self) -> None:
        """OLMo's initialisations, as its dense blocks have them; experts and router as the branch does."""
        for norm in (self.k_norm, self.q_norm, self.attn_norm, self.ff_norm):
            if norm is not None:
                norm.reset_parameters()
        in_std, attn_out_std, ff_out_std, cutoff = self._standard_deviations()
        init_normal(self.att_proj, in_std, cutoff)
        init_normal(self.attn_out, attn_out_std, cutoff)
        mlp = self.ffn.experts.mlp
        for weight, std in ((mlp.w1, in_std), (mlp.w2, ff_out_std), (mlp.v1, in_std)):
            if weight is not None:
                _normal(weight, std, cutoff)
        if self.ffn.experts.bias is not None:
            nn.init.zeros_(self.ffn.experts.bias)
        init_normal(self.ffn.router.layer, in_std, cutoff)
        shared = self.ffn.shared_expert
        if shared is not None:
            init_normal(shared.up_proj, in_std, cutoff)
            init_normal(shared.down_proj, ff_out_std, cutoff)
            if shared.gate_proj is not None:
                init_normal(shared.gate_proj, in_std, cutoff)
        if hasattr(self.act, "reset_parameters"):
            self.act.reset_parameters()

    def _standard_deviations(self) -> tuple[float, float, float, float | None]:
        """Of input projections, attention output and feed-forward output, and the cutoff in units of it."""
        config: Any = self.config
        cutoff = config.init_cutoff_factor
        if config.init_fn == InitFnType.normal:
            return config.init_std, config.init_std, config.init_std, cutoff
        if config.init_fn == InitFnType.mitchell:
            depth = 2 * (self.layer_id + 1)
            ff_out_std = 1 / math.sqrt(depth * self.ffn_width)
            return (
                1 / math.sqrt(config.d_model),
                1 / math.sqrt(depth * config.d_model),
                ff_out_std,
                cutoff or 3.0,
            )
        if config.init_fn == InitFnType.full_megatron:
            out_std = config.init_std / math.sqrt(2 * config.n_layers)
            return config.init_std, out_std, out_std, cutoff or 3.0
        raise NotImplementedError(config.init_fn)


def _normal(weight: Tensor, std: float, cutoff: float | None) -> None:
    """`init_normal` for a tensor that no module owns as its `weight`."""
    if cutoff is None:
        nn.init.normal_(weight, std=std)
    else:
        nn.init.trunc_normal_(weight, std=std, a=-cutoff * std, b=cutoff * std)
