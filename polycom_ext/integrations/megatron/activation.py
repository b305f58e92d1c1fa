"""The activation as Megatron's MLP and expert blocks hold it: exact and complete in gradient in every layout.

It takes FC1's output, FC1's bias and the router's weight of each token, and does the rest: one pass over
memory where the operations are fused, and plain operations in the order of upstream's own where not.

Width sharded over tensor parallelism: row sums are reduced over the group that shards it, see
`functional.py`.

Gradients of the coefficients. In a dense MLP every tensor-parallel rank ends up with the complete gradient,
and data parallelism averages it like any other. An expert block's activation is shared by all experts, which
live on different ranks of the expert-, expert-tensor- and tensor-parallel groups. Its coefficients are
therefore kept as ordinary (non-expert) parameters: their gradient is the sum over all ranks of tensor and
data parallelism. The former sum is what Megatron does to parameters marked `sequence_parallel`, the latter is
data parallelism itself.

Gradients of the others. FC1's bias is sharded as the width is, and every rank sees all of its rows, so that
its gradient is complete. The gradient of a router's weight is the rank's share of the row, as that of the row
itself, and is summed where that is: by the token dispatcher, which gathered both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from polycom_ext.activations import build
from polycom_ext.ops.calls import scale_rows

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from torch.distributed import ProcessGroup


class _InMLP(nn.Module):
    """An activation between FC1 and FC2. Its coefficients are whole on every rank: float32, saved once."""

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        tokens_per_expert: list[int] | None = None,
    ) -> Tensor:
        """act(x + bias) * token_weight, in x's type.

        The fused operations form it in float32 and round once. Plain ones round each of the three, and
        multiply in the wider type of the two, as upstream does for its own activations.

        Args:
            x: [..., width], FC1's output.
            bias: (width,); (experts, width) where x is [tokens, width], grouped by expert.
            token_weight: x.shape[:-1], any floating-point type.
            tokens_per_expert: with such a bias, how many rows each expert has; their sum is all rows.
        """
        act = super().forward
        if bias is None and token_weight is None:
            return cast(Tensor, act(x))
        grouped = bias is not None and bias.dim() == 2
        if getattr(self, "takes_variants", False):
            offsets = None
            if grouped:
                offsets = torch.tensor(tokens_per_expert, device=x.device).cumsum(0)
            return cast(Tensor, act(x, pre_bias=bias, row_scale=token_weight, offsets=offsets))
        if bias is not None:
            if grouped:
                counts = torch.tensor(tokens_per_expert, device=x.device)
                bias = bias.repeat_interleave(counts, dim=0, output_size=x.shape[0])
            x = x + bias
        return scale_rows(cast(Tensor, act(x)), token_weight)

    def of_experts(
        self, biases: list[Tensor] | None, tokens_per_expert: list[int]
    ) -> tuple[Callable[[Tensor, Tensor | None, Tensor], Tensor], Tensor | None]:
        """For a TEGroupedMLP: what takes the place of its `bias_act_func`, and the biases as one tensor.

        Tensors are its only arguments, as an output-discarding checkpoint needs it.

        Args:
            biases: of each local expert (width,); None where the linear layers have none.
            tokens_per_expert: how many rows each local expert has.
        """

        def bias_act_func(x: Tensor, bias: Tensor | None, probs: Tensor) -> Tensor:
            return cast(Tensor, self(x, bias, probs.squeeze(-1), tokens_per_expert))

        return bias_act_func, None if biases is None else torch.stack(list(biases))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Let `fn` move the coefficients but not change their type (Float16Module casts every parameter)."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        return super()._apply(move, recurse)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Entries of a distributed checkpoint, replicated over tensor and data parallelism."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            sharded_offsets=sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


def build_activation(config: TransformerConfig, tp_group: ProcessGroup, is_expert: bool) -> nn.Module:
    """Make the module that `config.polycom_activation` names.

    Args:
        config: a configuration that `prepare_config` has passed.
        tp_group: the group that shards the activation's width: tensor parallel, or expert tensor parallel.
        is_expert: whether routed experts use it; then it is one for the whole block.

    Returns an `_InMLP`; x is [..., width / tp_group.size()].
    """
    width = config.moe_ffn_hidden_size if is_expert else config.ffn_hidden_size
    module: Any = build(
        config.polycom_activation,
        width=width // tp_group.size(),
        hidden=config.hidden_size,
        group=tp_group,
        device="cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
        dtype=torch.float32,
    )
    module.__class__ = type(type(module).__name__, (_InMLP, type(module)), {})
    if is_expert:
        copies = tp_group.size()  # ranks that each have the complete gradient, over which it will be summed
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel
            if copies > 1:
                parameter.register_hook(lambda grad: grad / copies)
    return module


def share_activation(experts: nn.ModuleList) -> nn.Module:
    """Let all experts of a SequentialMLP use the first one's activation, and return it.

    It stops being a submodule of the experts, so that the caller can own it and it is counted and saved once.
    """
    shared: Any = experts[0].activation_func
    for expert in experts:
        del expert.activation_func
        object.__setattr__(expert, "activation_func", shared)
    return shared


def count_in_norm(*linears: nn.Module) -> None:
    """Let the gradient's norm count grouped linear layers' parameters of every tensor-parallel rank.

    Transformer Engine marks those of its other layers so, and those of grouped ones up to 2.12 only. Without
    the mark Megatron takes them for copies of the first rank's.
    """
    for linear in linears:
        for parameter in linear.parameters():
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
