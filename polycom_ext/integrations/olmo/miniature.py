"""What a rehearsal of an OLMo run keeps and what it shrinks, as changes to the spec.

Kept: how copies are sharded, what is recomputed, kinds of blocks, norms and router, the proportions of
widths, heads, experts and batch, the shape of the schedule, and the evaluators' labels. Options that none of
the functions below names stay as they are.
"""

from __future__ import annotations

from typing import Any

from polycom_ext.integrations.olmo import durations
from polycom_ext.integrations.olmo.native import BLOCK_SIZE
from polycom_ext.runs import rehearse, shrinking
from polycom_ext.runs.adapter import StandIn
from polycom_ext.runs.shrinking import INTERVAL, STEPS, positive
from polycom_ext.runs.spec import Spec

OF_THE_RUN = ("wandb", "load_path", "load_path_sharded_checkpointer", "remote_save_folder", "epoch")
"""What is of the run itself: where it is followed, and what it starts from."""
OF_GPUS = ("compile", "fused_loss", "data.prefetch_factor")
"""What a CPU has no kernel for, or no use."""
OF_ITS_TOKENS = ("paths", "datasets", "memmap_dtype", "label_mask_paths")
"""Options of data that say which tokens there are."""
INTERVALS = ("save_interval", "save_interval_unsharded", "save_interval_ephemeral", "eval_interval")
SUFFIX = ".npy"
"""Of the stand-in's token files."""


def changes(spec: Spec, data: StandIn, on_gpus: bool, in_blocks: bool) -> dict[str, Any]:
    """See `Adapter.rehearsal`; `in_blocks`: experts may be megablocks' sparse ones, of whole blocks."""
    ffn, model = _model(spec, in_blocks)
    copies, fsdp = _copies(spec)
    batch = _batch(spec, copies)
    length = batch["global_train_batch_size"] * (model.get("max_sequence_length") or shrinking.SEQUENCE)
    options = {
        **dict.fromkeys(OF_THE_RUN),
        **{f"model.{name}": value for name, value in {**model, **_vocabulary(data)}.items()},
        **fsdp,
        **batch,
        **_schedule(spec, length),
        **dict.fromkeys((name for name in INTERVALS if spec.options.get(name)), INTERVAL),
        "console_log_interval": 1,
        **_tokens(spec, data),
    }
    if not on_gpus:
        options |= dict.fromkeys(OF_GPUS)
    result = {"nodes": 1, "processes_per_node": copies, "ffn_width": ffn}
    result |= {f"olmo.{name}": value for name, value in options.items()}
    return result if on_gpus else {**result, **rehearse.on_a_cpu(spec.trainer)}


def _section(spec: Spec, name: str) -> dict[str, Any]:
    found = spec.options.get(name)
    return found if isinstance(found, dict) else {}


def _model(spec: Spec, in_blocks: bool) -> tuple[int | None, dict[str, Any]]:
    """The spec's `ffn_width`, where it has one, and the sizes of the model that it gives."""
    given = _section(spec, "model")
    made: dict[str, Any] = {}
    if layers := positive(given.get("n_layers")):
        made["n_layers"] = shrinking.layers(layers, positive(given.get("block_group_size")) or 1)
    if length := positive(given.get("max_sequence_length")):
        made["max_sequence_length"] = shrinking.sequence(length)
    experts, chosen = positive(given.get("moe_num_experts")), positive(given.get("moe_top_k"))
    if experts and chosen:
        made["moe_num_experts"], made["moe_top_k"] = shrinking.experts(experts, chosen)
    hidden, heads = positive(given.get("d_model")), positive(given.get("n_heads"))
    if not hidden or not heads:
        return spec.ffn_width, made
    groups = positive(given.get("n_kv_heads"))
    made["n_heads"], fewer_groups = shrinking.heads(heads, groups or heads)
    if groups:
        made["n_kv_heads"] = fewer_groups
    ffn = spec.ffn_width or positive(given.get("mlp_hidden_size")) or 4 * hidden
    is_sparse = given.get("block_type") == "moe" and given.get("moe_mlp_impl", "sparse") == "sparse"
    unit = (3 if ffn % 3 == 0 else 1) * (BLOCK_SIZE if is_sparse and in_blocks else 1)
    made["d_model"], width = shrinking.widths(hidden, ffn, heads, made["n_heads"], unit)
    if spec.ffn_width is None and "mlp_hidden_size" in given:
        made["mlp_hidden_size"] = width
    return (None if spec.ffn_width is None else width), made


def _vocabulary(data: StandIn) -> dict[str, int]:
    last = data.vocabulary - 1
    sizes = dict.fromkeys(("vocab_size", "embedding_size"), data.vocabulary)
    return {**sizes, "eos_token_id": last, "pad_token_id": last}


def _copies(spec: Spec) -> tuple[int, dict[str, Any]]:
    """Processes, each of which is a copy, and the replicas among which hybrid strategies shard."""
    fsdp = _section(spec, "fsdp")
    if spec.world_size >= 4 and "HYBRID" in str(fsdp.get("sharding_strategy")):
        return 4, {"fsdp.hybrid_sharding_num_model_replicas": 2}
    return shrinking.replicas(spec.world_size), {}


def _batch(spec: Spec, copies: int) -> dict[str, Any]:
    batch = positive(spec.options.get("global_train_batch_size")) or 512  # OLMo's own
    of_one = max(1, batch // spec.world_size)
    micro = min(of_one, positive(spec.options.get("device_train_microbatch_size")) or 16)
    micro, accumulated = shrinking.batch(micro, of_one // micro)
    return {
        "global_train_batch_size": micro * accumulated * copies,
        "device_train_microbatch_size": micro,
        "device_eval_batch_size": micro,
    }


def _schedule(spec: Spec, tokens: int) -> dict[str, Any]:
    """The length, in steps or tokens as it was, and what counts in it as the share of it that it was.

    Args:
        tokens: in a step of the rehearsal.
    """
    scheduler = _section(spec, "scheduler")
    duration = spec.options.get("max_duration", 10_000)
    in_tokens = isinstance(duration, str) and duration.strip().endswith("T")
    made: dict[str, Any] = {"max_duration": f"{STEPS * tokens}T" if in_tokens else STEPS}
    before = durations.steps(spec.options, duration) or STEPS  # of epochs: nobody has counted the data
    stop_at = positive(spec.options.get("stop_at"))
    if stop_at is not None:
        made["stop_at"] = min(STEPS, shrinking.share(stop_at, before, STEPS))
    length, whole = before, STEPS
    if scheduler.get("units") == "tokens":
        length, whole = before * (durations.tokens_a_step(spec.options) or tokens), STEPS * tokens
    for name in ("t_warmup", "t_max", "grad_clip_warmup_steps"):
        part = scheduler.get(name, 100 if name == "t_warmup" else None)  # OLMo's own
        if isinstance(part, int | float):
            made[f"scheduler.{name}"] = shrinking.share(part, length, whole)
    made["scheduler.t_warmup"] = min(made["scheduler.t_warmup"], whole - whole // STEPS)
    return made


def _tokens(spec: Spec, data: StandIn) -> dict[str, Any]:
    """The stand-in's files and tokenizer; an evaluator keeps its labels, and reads about a batch for each."""
    train, valid = [data.train + SUFFIX], [data.valid + SUFFIX]
    given = _section(spec, "data")
    made: dict[str, Any] = {f"data.{name}": None for name in OF_ITS_TOKENS if name in given}
    evaluators = spec.options.get("evaluators")
    if isinstance(evaluators, list) and all(isinstance(one, dict) for one in evaluators):
        made["evaluators"] = [_evaluator(one, valid) for one in evaluators]
    return {**made, "data.paths": train, "tokenizer.identifier": data.tokenizer}


def _evaluator(evaluator: dict[str, Any], files: list[str]) -> dict[str, Any]:
    small = {**evaluator, "subset_num_batches": 1}
    small.pop("device_eval_batch_size", None)
    if evaluator.get("type", "lm") != "lm":
        return small
    given = evaluator.get("data") or {}
    kept = {name: value for name, value in given.items() if name not in (*OF_ITS_TOKENS, "prefetch_factor")}
    labels = given.get("datasets")
    if not isinstance(labels, dict):
        return {**small, "data": {**kept, "paths": files}}
    datasets = dict.fromkeys(labels, files)
    return {**small, "subset_num_batches": len(datasets), "data": {**kept, "datasets": datasets}}
