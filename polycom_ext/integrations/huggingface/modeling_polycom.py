"""PolyCom language models for transformers 4.57 and 5: Llama's model around an FFN of ours.

Saved beside a model's weights with its two companions. Attention, caches, generation, checkpointing of
activations and what they support (SDPA, flash attention, torch.compile) are those of transformers' Llama;
here stand the FFN, dense or of experts, the normalisations, and what OLMo adds to the projections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .activation_polycom import build, reset
from .configuration_polycom import PolyComConfig


def _norm(config: PolyComConfig, width: int) -> nn.Module:
    """A normalisation of the blocks."""
    kind, affine, bias = (config.norm[key] for key in ("kind", "affine", "bias"))
    eps = config.rms_norm_eps
    if kind == "layer":
        return nn.LayerNorm(width, eps=eps, elementwise_affine=affine, bias=bias)
    return LlamaRMSNorm(width, eps=eps) if affine else nn.RMSNorm(width, eps=eps, elementwise_affine=False)


class Projection(nn.Linear):
    """To queries, keys or values; what it gives is normalised and clipped where the model asks for it."""

    def __init__(self, config: PolyComConfig, heads: int, normalized: bool) -> None:
        super().__init__(config.hidden_size, heads * config.head_dim, bias=config.attention_bias)
        self.clip = config.clip_qkv
        self.head_dim = config.head_dim if config.qk_norm == "head" else None
        if normalized and config.qk_norm is not None:
            self.norm = LlamaRMSNorm(self.head_dim or self.out_features, eps=config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        if hasattr(self, "norm"):
            y = (
                self.norm(y)
                if self.head_dim is None
                else self.norm(y.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            )
        return y if self.clip is None else y.clamp(-self.clip, self.clip)


class Attention(LlamaAttention):
    """Llama's, with projections of ours."""

    def __init__(self, config: PolyComConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.q_proj = Projection(config, config.num_attention_heads, normalized=True)
        self.k_proj = Projection(config, config.num_key_value_heads, normalized=True)
        self.v_proj = Projection(config, config.num_key_value_heads, normalized=False)


class FeedForward(nn.Module):
    """down_proj(act_fn(up_proj(x))); a gated activation reads [gate_proj(x), up_proj(x)]."""

    def __init__(self, config: PolyComConfig) -> None:
        super().__init__()
        hidden, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if config.activation["gated"]:
            self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.act_fn = build(config.activation, width, hidden)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        if hasattr(self, "gate_proj"):
            up = torch.cat((self.gate_proj(x), up), dim=-1)
        y: Tensor = self.down_proj(self.act_fn(up))
        return y


class Experts(nn.Module):
    """The FFNs of all experts; their weights are stacked, and they share the activation.

    up_proj, and gate_proj of a gated activation, are (experts, width, hidden), down_proj is (experts, hidden,
    width).
    """

    def __init__(self, config: PolyComConfig) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.intermediate_size
        if config.mlp_bias:
            raise ValueError("mlp_bias: experts have none")
        if config.activation["gated"]:
            self.gate_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.act_fn = build(config.activation, width, hidden)
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """The tokens' (tokens, hidden) result from one expert."""
        up = nn.functional.linear(x, self.up_proj[expert])
        if hasattr(self, "gate_proj"):
            up = torch.cat((nn.functional.linear(x, self.gate_proj[expert]), up), dim=-1)
        return nn.functional.linear(self.act_fn(up), self.down_proj[expert])


class SparseFeedForward(nn.Module):
    """Each token goes to the experts that the router finds likeliest; no token is dropped."""

    def __init__(self, config: PolyComConfig) -> None:
        super().__init__()
        self.active, self.normalizes = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        probabilities = self.gate(tokens).softmax(dim=-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.active, dim=-1)
        if self.normalizes:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        result = torch.zeros_like(tokens)
        for expert in chosen.unique().tolist():
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            part = self.experts(tokens[rows], expert) * weights[rows, places, None].to(x.dtype)
            result = result.index_add(0, rows, part)
        return result.reshape(x.shape)


class PolyComDecoderLayer(LlamaDecoderLayer):
    """Llama's block with an FFN of ours; or OLMo 2's, which normalises what attention and FFN give."""

    def __init__(self, config: PolyComConfig, layer_idx: int) -> None:
        GradientCheckpointingLayer.__init__(self)  # Llama's own would make its gated FFN
        self.hidden_size = config.hidden_size
        self.self_attn = Attention(config, layer_idx)
        self.mlp = SparseFeedForward(config) if config.num_experts else FeedForward(config)
        self.norm_after = config.norm_after
        if not self.norm_after:
            self.input_layernorm = _norm(config, config.hidden_size)
        self.post_attention_layernorm = _norm(config, config.hidden_size)
        if self.norm_after:
            self.post_feedforward_layernorm = _norm(config, config.hidden_size)

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        if not self.norm_after:
            before: Tensor = super().forward(hidden_states, **given)
            return before
        attended, _ = self.self_attn(hidden_states=hidden_states, **given)
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        after: Tensor = hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states))
        return after


class PolyComPreTrainedModel(LlamaPreTrainedModel):
    """What model and head share."""

    config_class = PolyComConfig
    _no_split_modules = ["PolyComDecoderLayer"]  # noqa: RUF012 as transformers declares it
    _can_record_outputs = {"hidden_states": PolyComDecoderLayer, "attentions": Attention}  # noqa: RUF012

    @property
    def _can_compile_fullgraph(self) -> bool:
        """Experts are looped over by how many tokens they got."""
        return not self.config.num_experts

    def post_init(self) -> None:
        """Coefficients are a few numbers, float32 in training too, and stay so whatever type is asked for."""
        learns = any(".act_fn." in name for name, _ in self.named_parameters())
        self._keep_in_fp32_modules_strict = ["act_fn"] if learns else None
        super().post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Experts):
            for name in ("gate_proj", "up_proj", "down_proj"):
                if hasattr(module, name):
                    nn.init.normal_(getattr(module, name), std=self.config.initializer_range)
        elif not reset(module):
            super()._init_weights(module)


class PolyComModel(PolyComPreTrainedModel, LlamaModel):
    """Embeddings, blocks and the last normalisation."""

    def __init__(self, config: PolyComConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [PolyComDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = _norm(config, config.hidden_size)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class PolyComForCausalLM(PolyComPreTrainedModel, LlamaForCausalLM):
    """The language model."""

    def __init__(self, config: PolyComConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = PolyComModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
