"""What a TrainConfig must satisfy before anything is built; each refusal is one sentence."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch.compiler import list_backends

from polycom_ext import activations
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.olmo.checkpoint import check_format
from polycom_ext.integrations.olmo.native import BLOCK_SIZE, NATIVE
from polycom_ext.integrations.olmo.ranges import check_numbers

PRECISIONS = ("fp32", "amp_bf16", "amp_fp16")
INITIALISATIONS = ("normal", "mitchell", "full_megatron")
"""Of those that OLMo's configuration names, the ones that its models, dense or not, know."""


def check(cfg: Any, world_size: int, on_branch: bool) -> None:
    """Raise PolycomError for a configuration that `world_size` ranks could not train, or not rightly.

    `on_branch`: OLMo is the MoE branch, whose experts are megablocks', not 0.6.0 with ours.
    """
    check_numbers(cfg)
    entry, _ = activations.parse(cfg.model.activation_type)
    hidden = _hidden_size(cfg.model)
    if entry.gated and hidden % 2:
        raise PolycomError(f"model.mlp_hidden_size {hidden} is odd, but {entry.name} is gated and halves it")
    _check_model(cfg.model)
    _check_batch(cfg, world_size)
    _check_precision(cfg)
    _check_strategy(cfg)
    _check_flash_attention(cfg)
    if cfg.compile is not None and cfg.compile.backend not in list_backends(exclude_tags=()):
        raise PolycomError(f"compile.backend: torch has no {cfg.compile.backend!r}")
    check_format(cfg)
    if cfg.model.block_type == "moe":
        _check_moe(cfg)
        if on_branch:
            _check_megablocks(cfg.model, hidden // 2 if entry.gated else hidden)
        elif not cfg.model.moe_dropless:
            raise PolycomError(
                "model.moe_dropless: false needs megablocks, and so the MoE branch; on OLMo 0.6.0 every "
                "token reaches its experts"
            )
        elif not hasattr(torch.nn.functional, "grouped_mm"):
            raise PolycomError(
                f"model.block_type: on OLMo 0.6.0 moe needs torch 2.10, and this is {torch.__version__}"
            )


def _hidden_size(model: Any) -> int:
    return model.mlp_hidden_size if model.mlp_hidden_size is not None else model.mlp_ratio * model.d_model


def _check_model(model: Any) -> None:
    if model.d_model % model.n_heads:
        raise PolycomError(f"model.n_heads {model.n_heads} does not divide model.d_model {model.d_model}")
    if model.n_heads % model.effective_n_kv_heads:
        raise PolycomError(
            f"model.n_kv_heads {model.effective_n_kv_heads} does not divide model.n_heads {model.n_heads}"
        )
    if model.rope and model.d_model // model.n_heads % 2:
        raise PolycomError(
            f"model.rope turns pairs of numbers, but a head has {model.d_model // model.n_heads} of them "
            "(model.d_model / model.n_heads)"
        )
    if model.init_fn not in INITIALISATIONS:
        raise PolycomError(
            f"model.init_fn: {model.init_fn} is not there in OLMo; take {', '.join(INITIALISATIONS)}"
        )
    for name, size in (("eos_token_id", model.vocab_size), ("pad_token_id", model.embedding_size)):
        token = getattr(model, name)
        if size is not None and token >= size:
            raise PolycomError(f"model.{name} {token} is beyond the {size} tokens of the vocabulary")


def _check_precision(cfg: Any) -> None:
    if cfg.precision not in PRECISIONS:
        raise PolycomError(f"precision must be one of {', '.join(PRECISIONS)}, not {cfg.precision}")
    for data in (cfg.data, *(evaluator.data for evaluator in cfg.evaluators)):
        kind = getattr(np, data.memmap_dtype, None)
        if not (isinstance(kind, type) and issubclass(kind, np.integer)):
            raise PolycomError(f"data.memmap_dtype must be a type of integers, not {data.memmap_dtype}")


def _check_flash_attention(cfg: Any) -> None:
    """What OLMo has from flash-attn only; plain attention it also takes from torch."""
    if find_spec("flash_attn") is not None:
        return
    needs = "needs the package flash-attn, which is not installed"
    if cfg.fused_loss:
        raise PolycomError(f"fused_loss {needs}; without it OLMo computes the same loss in torch")
    if getattr(cfg.data, "generate_doc_lengths", False):
        raise PolycomError(f"data.generate_doc_lengths masks documents, which {needs}")


def _check_batch(cfg: Any, world_size: int) -> None:
    batch, micro = cfg.global_train_batch_size, cfg.device_train_microbatch_size
    if batch % world_size:
        raise PolycomError(f"global_train_batch_size {batch} is not a multiple of {world_size} processes")
    if batch // world_size % micro and batch // world_size > micro:
        raise PolycomError(
            f"a process's batch of {batch // world_size} is not a multiple of "
            f"device_train_microbatch_size {micro}"
        )


def _check_strategy(cfg: Any) -> None:
    strategy = cfg.distributed_strategy
    if strategy not in ("fsdp", "ddp"):
        raise PolycomError("distributed_strategy must be fsdp or ddp: OLMo's Trainer has no other")
    if getattr(cfg, strategy) is None:
        raise PolycomError(f"distributed_strategy: {strategy} needs a section `{strategy}`")
    if strategy == "fsdp" and not cfg.fsdp.use_orig_params:
        raise PolycomError(
            "fsdp.use_orig_params must be true: weight decay is decided parameter by parameter"
        )
    if strategy == "ddp" and cfg.ddp.find_unused_params and cfg.ddp.grad_sync_mode != "micro_batch":
        raise PolycomError("ddp.find_unused_params needs ddp.grad_sync_mode: micro_batch")
    if strategy == "ddp" and cfg.model.init_device == "meta":
        raise PolycomError("model.init_device: meta needs distributed_strategy: fsdp")
    if strategy == "ddp" and cfg.save_interval_unsharded is None and not cfg.dry_run:
        raise PolycomError(
            "distributed_strategy: ddp saves unsharded checkpoints: set save_interval_unsharded"
        )


def _check_moe(cfg: Any) -> None:
    model = cfg.model
    entry, _ = activations.parse(model.activation_type)
    if entry.gated and model.activation_type not in NATIVE:
        raise PolycomError(f"an MoE block gates with swiglu only, not with {entry.name}")
    for name in ("moe_num_experts", "moe_top_k"):
        if getattr(model, name) is None:
            raise PolycomError(f"model.{name} must be a number in a model of experts, not null")
    if not 1 <= model.moe_top_k <= model.moe_num_experts:
        raise PolycomError(f"model.moe_top_k {model.moe_top_k} is not in 1..{model.moe_num_experts} experts")
    if model.moe_mlp_impl not in ("sparse", "grouped"):
        raise PolycomError(f"model.moe_mlp_impl must be sparse or grouped, not {model.moe_mlp_impl!r}")
    if cfg.activation_checkpointing not in (None, "fine_grained"):
        raise PolycomError(
            f"activation_checkpointing: {cfg.activation_checkpointing} would run the routers twice; an MoE "
            "model takes fine_grained or none"
        )


def _check_megablocks(model: Any, width: int) -> None:
    """The fork's losses come as a pair or crash, and some of its layouts cannot hold every activation."""
    if not model.moe_loss_weight or not model.moe_zloss_weight:
        raise PolycomError(
            "model.moe_loss_weight and model.moe_zloss_weight must both be above 0 on the MoE branch: its "
            "fork of megablocks returns both losses or none (OLMo 0.6.0 takes either)"
        )
    if model.moe_dropless and model.moe_mlp_impl == "sparse" and width % BLOCK_SIZE:
        raise PolycomError(
            f"an FFN width of {width} is not a multiple of {BLOCK_SIZE}, as moe_mlp_impl: sparse needs; take "
            "grouped, or another width"
        )
    if not model.moe_dropless and activations.parse(model.activation_type)[0].gated:
        raise PolycomError("moe_dropless: false has no gate in megablocks, so it cannot hold swiglu")
    if model.moe_shared_expert and model.activation_type not in NATIVE:
        raise PolycomError(
            f"moe_shared_expert on the MoE branch cannot hold {model.activation_type}: its layout is not the "
            "experts' (OLMo 0.6.0 can)"
        )
