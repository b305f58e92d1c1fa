"""From a TrainConfig to a trained model, in the order of upstream's scripts/train.py. Imports OLMo."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
import wandb
from olmo.config import CheckpointType
from olmo.data import build_train_dataloader
from olmo.eval import build_evaluators
from olmo.model import OLMo
from olmo.optim import BoltOnWarmupScheduler, build_optimizer, build_scheduler
from olmo.torch_util import barrier, get_global_rank, get_local_world_size, get_world_size, seed_all
from olmo.util import find_latest_checkpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn.parallel import DistributedDataParallel as DDP

from polycom_ext.errors import PolycomError
from polycom_ext.integrations.olmo import checkpoint, inputs, saved
from polycom_ext.integrations.olmo.initialisation import reset_parameters
from polycom_ext.integrations.olmo.recording import RecordingTrainer
from polycom_ext.runs.efficiency import Efficiency, model_flops
from polycom_ext.runs.record import Record

log = logging.getLogger("polycom.olmo")


def build(cfg: Any, device: torch.device, output: Path | None) -> RecordingTrainer:
    """Make data, evaluators, model, optimizer and trainer; no checkpoint is read yet.

    Raises PolycomError or OLMoConfigurationError for what could not be built.
    """
    resumes = _find_checkpoint(cfg)
    checkpoint.check_source(cfg, get_world_size())
    inputs.check_tokenizer(cfg)
    inputs.check_amount(cfg, get_world_size())
    _save_config(cfg, resumes)
    _start_wandb(cfg)
    seed_all(cfg.seed)
    try:
        with inputs.reaching("data"):
            train_loader = build_train_dataloader(cfg)
            evaluators = build_evaluators(cfg, device)
    except FileNotFoundError as error:
        raise PolycomError(f"data: {error.filename or error} does not exist") from None
    except KeyError as error:
        raise PolycomError(f"evaluators: OLMo has no downstream task {error}") from None
    model = OLMo(cfg.model, init_params=False)
    model.set_activation_checkpointing(cfg.activation_checkpointing)
    log.info("%s parameters", f"{model.num_params():,}")
    measured = Efficiency.here(flops_per_token(model))
    if cfg.compile is not None:
        for block in model.transformer.blocks:
            block.compile(**cfg.compile.asdict())
    dist_model = wrap(cfg, model, device)
    reset_parameters(model, dist_model, cfg.seed)
    trainer = RecordingTrainer(
        cfg=cfg,
        epoch=cfg.epoch,
        model=model,
        dist_model=dist_model,
        optim=build_optimizer(cfg, dist_model),
        scheduler=build_scheduler(cfg),
        train_loader=train_loader,
        device=device,
        evaluators=evaluators,
        indices_file=_open_indices_file(cfg, resumes),
    )
    trainer.output, trainer.efficiency = output, measured
    if output is not None and get_global_rank() == 0:
        measured.write(Record(output))
    return trainer


def train(trainer: RecordingTrainer) -> None:
    """Load the checkpoint to go on from, if there is one, train to the end, and write what was learned."""
    cfg = trainer.cfg
    trainer.hear_stop()
    with trainer:
        checkpoint.begin_state(cfg, trainer.optim)
        if cfg.load_path is not None:
            _load(trainer)
        elif not cfg.dry_run and not cfg.no_pre_train_checkpoint:
            _try_saving(trainer)
        if cfg.force_save_unsharded and cfg.distributed_strategy == "fsdp":
            trainer.save_checkpoint(CheckpointType.unsharded)
        if cfg.stop_at is None:
            cfg.stop_at = trainer.max_steps
        if not cfg.dry_run and trainer.global_step < cfg.stop_at:
            trainer.fit()
        trainer.write_coefficients()


def flops_per_token(model: OLMo) -> float:
    """`efficiency.model_flops` of a model that is not sharded yet; OLMo itself counts experts at rest."""
    cfg = model.config
    weights = 0.0
    for name, parameter in model.named_parameters():
        is_table = ".wpe." in name or (".wte." in name and not cfg.weight_tying)
        if parameter.ndim > 1 and not is_table and ".router." not in name:
            is_chosen = ".experts." in name
            weights += parameter.numel() * (cfg.moe_top_k / cfg.moe_num_experts if is_chosen else 1)
    return model_flops(weights, cfg.n_layers, cfg.d_model, cfg.max_sequence_length)


def wrap(cfg: Any, model: OLMo, device: torch.device) -> nn.Module:
    """The model under DDP or FSDP, as the configuration asks; parameters are initialised afterwards."""
    if cfg.distributed_strategy == "ddp":
        return DDP(model.to(device), find_unused_parameters=cfg.ddp.find_unused_params)

    def materialise(module: nn.Module) -> None:
        module.to_empty(device=device, recurse=False)

    return FSDP(
        model,
        sharding_strategy=cfg.fsdp.sharding_strategy,
        mixed_precision=cfg.fsdp_precision,
        auto_wrap_policy=model.get_fsdp_wrap_policy(cfg.fsdp.wrapping_strategy),
        use_orig_params=cfg.fsdp.use_orig_params,
        limit_all_gathers=True,
        device_id=device,
        device_mesh=_hybrid_mesh(cfg, device),
        param_init_fn=materialise,
    )


def _hybrid_mesh(cfg: Any, device: torch.device) -> Any:
    """Replicas times shards, for the hybrid strategies; None for the others."""
    if "HYBRID" not in cfg.fsdp.sharding_strategy.name:
        return None
    replicas = cfg.fsdp.hybrid_sharding_num_model_replicas or get_world_size() // get_local_world_size()
    if replicas < 1 or get_world_size() % replicas:
        raise PolycomError(f"fsdp.hybrid_sharding_num_model_replicas {replicas} does not divide the ranks")
    if replicas == get_world_size() > 1:
        raise PolycomError(
            f"{replicas} replicas on {replicas} ranks leave nothing to shard, and torch would not average "
            "their gradients: take fsdp.sharding_strategy: NO_SHARD, or distributed_strategy: ddp"
        )
    return init_device_mesh(device.type, (replicas, get_world_size() // replicas))


def _find_checkpoint(cfg: Any) -> bool:
    """Whether the run goes on from its own latest checkpoint; that is then what will be loaded, as it is."""
    for folder in (cfg.save_folder, cfg.remote_save_folder) if cfg.try_load_latest_save else ():
        with inputs.reaching(str(folder)):
            latest = _latest(folder) if folder is not None else None
        if latest is not None:
            cfg.load_path, cfg.load_path_sharded_checkpointer = str(latest), None
            cfg.restore_dataloader = True
            cfg.reset_trainer_state = cfg.reset_optimizer_state = False
            return True
    return False


def _latest(folder: str) -> Any:
    """Upstream's choice, but of whole ones where they can be looked at; the first rank looks for all."""
    if "://" in folder:
        return find_latest_checkpoint(folder)
    chosen: list[Any] = [None, None]
    if get_global_rank() == 0:
        try:
            chosen[0] = saved.choice(Path(folder)).path
        except PolycomError as error:
            chosen[1] = str(error)
    dist.broadcast_object_list(chosen)
    if chosen[1] is not None:
        raise PolycomError(chosen[1])
    return chosen[0]


def _save_config(cfg: Any, resumes: bool) -> None:
    if get_global_rank() == 0 and not cfg.dry_run:
        path = Path(cfg.save_folder) / "config.yaml"
        if path.exists() and not cfg.save_overwrite and not resumes:
            raise PolycomError(f"{path} already exists: take another save_folder, or save_overwrite: true")
        path.parent.mkdir(parents=True, exist_ok=True)
        cfg.save(path)
    barrier()


def _start_wandb(cfg: Any) -> None:
    if cfg.wandb is None or (get_global_rank() != 0 and cfg.wandb.rank_zero_only):
        return
    folder = Path(cfg.save_folder) / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    names = ("project", "entity", "group", "name", "tags")
    settings = {name: getattr(cfg.wandb, name) for name in names}
    try:
        wandb.init(dir=folder, config=cfg.asdict(exclude=["wandb"]), **settings)
    except wandb.Error as error:
        raise PolycomError(f"wandb: {error}; without the section `wandb` nothing is sent") from None


def _open_indices_file(cfg: Any, resumes: bool) -> TextIO | None:
    """Where each rank notes the instances that it trains on; a resumed run adds to it."""
    if not cfg.save_data_indices:
        return None
    path = Path(cfg.save_folder) / "data-indices" / f"rank{get_global_rank()}.tsv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    return gzip.open(path, "at" if resumes else "wt")


def _load(trainer: RecordingTrainer) -> None:
    cfg = trainer.cfg
    log.info("Loading %s", cfg.load_path)
    with checkpoint.reading(cfg.load_path), inputs.reaching(f"load_path: {cfg.load_path}"):
        trainer.restore_checkpoint(
            cfg.load_path,
            load_optimizer_state=not cfg.reset_optimizer_state,
            load_trainer_state=not cfg.reset_trainer_state,
            sharded_checkpointer=cfg.load_path_sharded_checkpointer,
        )
    if cfg.reset_optimizer_state and not cfg.reset_trainer_state:
        step = trainer.global_step
        trainer.scheduler = BoltOnWarmupScheduler.wrap(
            trainer.scheduler, step, int(step + cfg.scheduler.t_warmup)
        )


def _try_saving(trainer: RecordingTrainer) -> None:
    """Save and load at once: a full disk shows now, not after a thousand steps."""
    cfg = trainer.cfg
    sharded = cfg.distributed_strategy == "fsdp" and cfg.save_num_checkpoints_to_keep != 0
    kind = CheckpointType.sharded if sharded else CheckpointType.unsharded
    path, cache = trainer.save_checkpoint(kind)
    with checkpoint.reading(str(cache or path)):
        trainer.restore_checkpoint(path, checkpoint_type=kind, local_cache=cache)
