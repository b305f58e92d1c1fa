"""The block's activation as the experts of OLMo's MoE branch call it, in every layout of megablocks.

    sparse     blocks of a block-sparse matrix, (blocks, 128, 128): ffn / 128 consecutive blocks hold 128 rows
    grouped    (tokens * top_k, ffn)
    capacity   (experts, capacity, ffn)

The layout follows from the configuration: a tensor's shape does not tell (2, 128, 128) of one from another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from polycom_ext import activations
from polycom_ext.integrations.olmo.native import BLOCK_SIZE, NATIVE


def share_activation(moe_args: Any, act: nn.Module, config: Any) -> None:
    """Let a block's experts call `act`, which the block has registered, so that it is trained and saved.

    Activations that OLMo knows stay as they are. Rows of the sparse layout's padding are zeros whose results
    are dropped, so they change nothing.
    """
    if config.activation_type in NATIVE:
        return
    entry, _ = activations.parse(config.activation_type)
    if entry.normalizes and config.moe_dropless and config.moe_mlp_impl == "sparse":
        moe_args.activation_fn = on_blocks(act, moe_args.ffn_hidden_size)
    else:
        # not the module itself: experts that stored it would register it a second time
        moe_args.activation_fn = lambda x: act(x)


def on_blocks(function: Callable[[Tensor], Tensor], width: int) -> Callable[[Tensor], Tensor]:
    """Make a function of rows one of the blocks (blocks, 128, 128) that hold rows of `width`."""
    columns = width // BLOCK_SIZE

    def apply(blocks: Tensor) -> Tensor:
        split = blocks.view(-1, columns, BLOCK_SIZE, BLOCK_SIZE).transpose(1, 2)
        rows = function(split.reshape(-1, width))
        return rows.view(-1, BLOCK_SIZE, columns, BLOCK_SIZE).transpose(1, 2).reshape(blocks.shape)

    return apply
