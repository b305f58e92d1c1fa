"""Checks of a TransformerConfig that names a PolyCom activation, before any model is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch.nn.functional as F
from torch import Tensor

from polycom_ext.activations import Activation, parse
from polycom_ext.errors import PolycomError

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


class _BuiltByTheMLP:
    """Stands in `config.activation_func`; the MLP builds the activation, so whoever calls this missed it."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, x: Tensor) -> NoReturn:
        raise RuntimeError(
            f"this path of Megatron applies config.activation_func, which cannot be {self.__name__!r}"
        )


def _reason_against(config: TransformerConfig, activation: Activation) -> str | None:
    """Why this configuration cannot be right with the activation; None when it can."""
    if activation.gated:
        return f"{activation.name} is Megatron's own: pass its flag (--{activation.name}) instead"
    if config.gated_linear_unit:
        return "it takes the place of the gated unit: remove --swiglu or --quick-geglu"
    if config.activation_func is not F.gelu and not isinstance(config.activation_func, _BuiltByTheMLP):
        return "a second activation is set: remove --squared-relu"
    if config.use_te_activation_func:
        return "--use-te-activation-func asks for Transformer Engine's activation: remove it"
    if config.activation_func_fp8_input_store:
        return "--activation-func-fp8-input-store holds for SwiGLU only: remove it"
    if config.transformer_impl == "inference_optimized":
        return (
            "the inference-optimized layers have fixed activations: use --transformer-impl transformer_engine"
        )
    if config.experimental_attention_variant == "gated_delta_net":
        return "gated_delta_net applies the MLP's activation inside attention"
    if config.moe_apply_probs_on_input and activation.normalizes:
        return "it normalises rows, so router weights on its input (--moe-apply-probs-on-input) vanish"
    if config.num_moe_experts and config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        return "experts under tensor parallelism need --sequence-parallel"
    return None


def prepare_config(config: TransformerConfig) -> None:
    """Check the configuration and take Megatron's own activation out of it; called from its __post_init__.

    Bias-activation fusion is switched off, since its kernels hold GELU and SwiGLU only. Raises PolycomError
    for an unknown activation and for a combination that cannot be right, with the reason.
    """
    assert config.polycom_activation is not None
    activation, _ = parse(config.polycom_activation)
    reason = _reason_against(config, activation)
    if reason is not None:
        raise PolycomError(f"--polycom-activation {config.polycom_activation}: {reason}")
    config.bias_activation_fusion = False
    config.activation_func = _BuiltByTheMLP(activation.name)
