"""In what range the numbers of a TrainConfig must lie; OLMo's dataclasses fix their types only.

A number out of its range ends in a traceback of upstream's, or trains wrongly without a word: a negative
max_grad_norm climbs the loss.
"""

from __future__ import annotations

import math
import re
from functools import reduce
from typing import Any

from polycom_ext.errors import PolycomError

COUNTS = """
    model.d_model model.n_heads model.n_kv_heads model.n_layers model.mlp_ratio model.mlp_hidden_size
    model.max_sequence_length model.vocab_size model.embedding_size model.block_group_size
    global_train_batch_size device_train_microbatch_size device_eval_batch_size
    save_interval save_interval_unsharded save_interval_ephemeral eval_interval console_log_interval
    canceled_check_interval gen1_gc_interval stop_at stop_after wandb.log_interval speed_monitor.window_size
    optimizer.metrics_log_interval data.prefetch_factor fsdp.hybrid_sharding_num_model_replicas
""".split()
"""At least 1, or null where OLMo takes that."""

NOT_NEGATIVE = """
    seed data.seed data.num_workers data.timeout extra_steps_after_cancel fast_forward_batches
    model.init_std model.emb_init_std model.layer_norm_eps model.eos_token_id model.pad_token_id
    model.moe_loss_weight model.moe_zloss_weight auxiliary_loss_multiplier
    optimizer.learning_rate optimizer.weight_decay optimizer.eps
    scheduler.t_warmup scheduler.alpha_f scheduler.warmup_min_lr
    scheduler.grad_clip_warmup_steps scheduler.grad_clip_warmup_factor
""".split()

POSITIVE = """
    max_grad_norm max_grad_norm_ratio time_limit early_stopping_factor scheduler.t_max
    model.rope_theta model.alibi_bias_max model.clip_qkv model.init_cutoff_factor model.moe_capacity_factor
""".split()

FRACTIONS = "model.attention_dropout model.residual_dropout model.embedding_dropout".split()

DURATION = re.compile(r"\s*(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?\s*T?|\s*\d+\s*ep")


def check_numbers(cfg: Any) -> None:
    """Raise PolycomError for the first number that lies out of its range."""
    for name in COUNTS:
        _require(cfg, name, lambda value: value >= 1, "at least 1")
    for name in NOT_NEGATIVE:
        _require(cfg, name, lambda value: 0 <= value < math.inf, "at least 0")
    for name in POSITIVE:
        _require(cfg, name, lambda value: value > 0, "above 0")
    for name in FRACTIONS:
        _require(cfg, name, lambda value: 0 <= value <= 1, "from 0 to 1")
    for beta in cfg.optimizer.betas:
        if not 0 <= beta < 1:
            raise PolycomError(f"optimizer.betas must be at least 0 and below 1, not {beta}")
    for evaluator in cfg.evaluators:
        size = evaluator.device_eval_batch_size
        if size is not None and size < 1:
            raise PolycomError(
                f"evaluators: {evaluator.label}: device_eval_batch_size must be at least 1, not {size}"
            )
    _check_duration(cfg.max_duration)


def _require(cfg: Any, name: str, fits: Any, what: str) -> None:
    value = reduce(lambda section, key: getattr(section, key, None), name.split("."), cfg)
    if value is not None and not fits(value):
        raise PolycomError(f"{name} must be {what}, not {value}")


def _check_duration(duration: int | str) -> None:
    if not DURATION.fullmatch(str(duration)) or not float(re.sub(r"ep|T", "", str(duration))) >= 1:
        raise PolycomError(
            f"max_duration {str(duration)!r} must be at least 1 step (10000), token (2e12T) or epoch (2ep)"
        )
