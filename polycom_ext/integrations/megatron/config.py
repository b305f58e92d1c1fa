"""Checks of a TransformerConfig that names a PolyCom activation, before any model is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch.nn.functional as F
from torch import Tensor

from polycom_ext.activations import Activation, parse
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron.native import FLAGS

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
    if activation.name in FLAGS and activation.gated:
        return f"{activation.name} is Megatron's own: pass its flag (--{activation.name}) instead"
    if activation.gated:
        return "it is gated, and Megatron's MLP has a place for its own gate only: take an ungated one"
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
    if recomputes(config, "mlp_act") and config.moe_shared_expert_overlap:
        return "--moe-shared-expert-overlap goes past mlp_act in --recompute-modules: remove one of them"
    if config.moe_apply_probs_on_input and activation.normalizes:
        return "it normalises rows, so router weights on its input (--moe-apply-probs-on-input) vanish"
    if config.num_moe_experts and config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        return "experts under tensor parallelism need --sequence-parallel"
    return _wrong_layout(config)


def recomputes(config: TransformerConfig, module: str) -> bool:
    """Whether --recompute-modules has it and is heeded."""
    return config.recompute_granularity == "selective" and module in config.recompute_modules


def _wrong_layout(config: TransformerConfig) -> str | None:
    """Why a model trains wrongly in this layout, with any activation: silent faults of Megatron's own."""
    tensor, expert_tensor = config.tensor_model_parallel_size, config.expert_tensor_parallel_size
    if config.add_bias_linear and recomputes(config, "mlp"):
        return (
            "--recompute-modules mlp needs --disable-bias-linear: with biases Megatron's backward pass never "
            "ends and takes all memory"
        )
    if not config.num_moe_experts:
        return None
    if config.add_bias_linear and tensor > 1 and config.transformer_impl == "local":
        return (
            "experts under tensor parallelism need --disable-bias-linear: Megatron's own linear layers sum "
            "the gradients of different experts' biases"
        )
    if config.expert_model_parallel_size == 1 and expert_tensor != tensor:
        return (
            f"--expert-tensor-parallel-size {expert_tensor} other than --tensor-model-parallel-size {tensor} "
            "needs --expert-model-parallel-size above 1: with 1, Megatron reduces the experts' gradients "
            "over the wrong ranks"
        )
    coefficient = config.moe_aux_loss_coeff
    weights = [*(coefficient if isinstance(coefficient, list) else [coefficient]), config.moe_z_loss_coeff]
    if config.calculate_per_token_loss and tensor > 1 and any(weights):
        return (
            "--calculate-per-token-loss weighs the router's losses by 1 / --tensor-model-parallel-size: "
            "remove one of them"
        )
    return None


def check_arguments(args: Any, config: TransformerConfig) -> None:
    """Check what Megatron was asked for, where its configuration alone does not tell.

    Raises PolycomError for what trains wrongly with any activation, and for what fails with this one.
    """
    reason = _wrong_layout(config)
    name = getattr(config, "polycom_activation", None)
    if reason is None and name is None and _norm_misses_experts(config) and args.clip_grad > 0:
        reason = (
            "--moe-grouped-gemm under tensor parallelism, with Transformer Engine 2.13 or later: the norm "
            "by which Megatron clips leaves out the experts of every rank but the first: give "
            "--moe-grouped-experts-in-norm, which counts them in the patched Megatron, or --clip-grad 0"
        )
    if reason is None and name is not None:
        if args.moe_use_upcycling:
            reason = "--moe-use-upcycling copies a dense model's fixed activation into the experts"
        elif parse(name)[0].learnable:
            if args.use_torch_fsdp2 and args.bf16:
                reason = "its coefficients are float32, and --use-torch-fsdp2 wants one type, so not --bf16"
            elif args.use_megatron_fsdp:
                reason = "--use-megatron-fsdp has not been tried with its float32 coefficients: remove it"
    if reason is not None:
        raise PolycomError(reason if name is None else f"--polycom-activation {name}: {reason}")


def _norm_misses_experts(config: TransformerConfig) -> bool:
    """Whether grouped experts are left out of the gradient's norm, since `count_in_norm` is not called."""
    if not (config.num_moe_experts and config.moe_grouped_gemm and config.tensor_model_parallel_size > 1):
        return False
    if getattr(config, "moe_grouped_experts_in_norm", False):  # a field of the patched Megatron
        return False
    from megatron.core.utils import is_te_min_version

    return config.transformer_impl == "transformer_engine" and bool(is_te_min_version("2.13.0"))


def prepare_config(config: TransformerConfig) -> None:
    """Check the configuration and take Megatron's own activation out of it; called from its __post_init__.

    Bias-activation fusion is switched off, since its kernels hold GELU and SwiGLU only. Raises PolycomError
    for an unknown activation and for a combination that cannot be right, with the reason. Layers on
    Transformer Engine's op fuser, which no option of 0.17.1 asks for, refuse themselves, in the first step,
    an activation without parameters and a Transformer Engine before 2.13.
    """
    assert config.polycom_activation is not None
    activation, _ = parse(config.polycom_activation)
    reason = _reason_against(config, activation)
    if reason is not None:
        raise PolycomError(f"--polycom-activation {config.polycom_activation}: {reason}")
    config.bias_activation_fusion = False
    config.activation_func = _BuiltByTheMLP(activation.name)
