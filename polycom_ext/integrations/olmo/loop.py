"""From a TrainConfig to a trained model: what OLMo's Trainer needs built, and what is kept of it.

Imports OLMo; on a CPU `rehearsal.enable("olmo")` comes first.
"""

from __future__ import annotations

import gzip
import json
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
import wandb
from olmo.config import CheckpointType, DDPGradSyncMode, DistributedStrategy, TrainConfig
from olmo.data import build_train_dataloader
from olmo.eval import build_evaluators
from olmo.exceptions import OLMoError
from olmo.model import OLMo
from olmo.optim import BoltOnWarmupScheduler, build_optimizer, build_scheduler
from olmo.torch_util import barrier, get_global_rank, get_local_world_size, get_world_size, seed_all
from olmo.train import Trainer
from olmo.util import add_cached_path_clients, clean_opt, find_latest_checkpoint, prepare_cli_environment
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy
from torch.nn.parallel import DistributedDataParallel as DDP

from polycom_ext.activations import parse
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.olmo.metrics import MetricsWriter, rename

log = logging.getLogger("train")

HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)


class RecordingTrainer(Trainer):
    """OLMo's trainer, with its metrics written to a file."""

    writer: MetricsWriter | None = None

    def train_step(self, batch: dict[str, Any], reduce_global_loss: bool = True) -> dict[str, float]:
        """One step; what is logged of it is written too."""
        start = time.perf_counter()
        metrics: dict[str, float] = super().train_step(batch, reduce_global_loss)
        if self.writer is not None and reduce_global_loss:
            self.writer.write(
                self.global_step,
                {
                    **rename(metrics),
                    "train/learning_rate": float(self.optim.param_groups[0]["lr"]),
                    "train/step_seconds": time.perf_counter() - start,
                },
            )
        return metrics

    def eval(self) -> dict[str, Any]:
        """All evaluators; their losses and accuracies are written too."""
        metrics: dict[str, Any] = super().eval()
        if self.writer is not None:
            self.writer.write(self.global_step, rename(metrics))
        return metrics


@dataclass
class Run:
    """Everything that is built before the first step."""

    config: TrainConfig
    trainer: RecordingTrainer
    activations: dict[str, nn.Module]
    """Modules with coefficients by name, in the model's order."""
    indices_file: TextIO | None


def load_config(path: Path | None, overrides: list[str]) -> TrainConfig:
    """The defaults, changed by a file, changed by `--KEY=VALUE`; PolycomError for what upstream refuses."""
    if path is not None and not path.is_file():
        raise PolycomError(f"configuration {path} does not exist")
    options = [clean_opt(override) for override in overrides]
    try:
        if path is not None:
            return TrainConfig.load(path, options)
        from omegaconf import OmegaConf

        return TrainConfig.new(**OmegaConf.to_container(OmegaConf.from_dotlist(options)))
    except (OLMoError, FileNotFoundError) as error:
        raise PolycomError(str(error)) from error


def prepare(config: TrainConfig, device: torch.device) -> Run:
    """Check the configuration, then build data, model, optimizer and trainer, and load a checkpoint.

    Raises PolycomError for a configuration that cannot be right.
    """
    _complete(config)
    prepare_cli_environment()
    add_cached_path_clients()
    try:
        resumes = _choose_checkpoint(config)
        _save_config(config)
        _start_wandb(config)
        seed_all(config.seed)
        train_loader = build_train_dataloader(config)
        evaluators = build_evaluators(config, device)
        model = OLMo(config.model)
    except (OLMoError, FileNotFoundError) as error:
        raise PolycomError(str(error)) from error
    log.info(f"{model.num_params():,d} parameters, {model.num_params(include_embedding=False):,d} without embeddings")
    model.set_activation_checkpointing(config.activation_checkpointing)
    activations = _with_coefficients(config, model)
    dist_model = _distribute(config, model, device)
    model.reset_parameters()
    indices_file = _open_indices_file(config, resumes)
    trainer = RecordingTrainer(
        cfg=config,
        epoch=config.epoch,
        model=model,
        dist_model=dist_model,
        optim=build_optimizer(config, dist_model),
        scheduler=build_scheduler(config),
        train_loader=train_loader,
        device=device,
        evaluators=evaluators,
        indices_file=indices_file,
    )
    return Run(config, trainer, activations, indices_file)


def train(run: Run, metrics: Path | None, coefficients: Path | None) -> None:
    """Load the checkpoint to go on from, if there is one, train to the end, and write what was learned."""
    config, trainer = run.config, run.trainer
    if metrics is not None and get_global_rank() == 0:
        trainer.writer = MetricsWriter(metrics)
    with trainer:
        _restore_or_save(config, trainer)
        if config.compile is not None:
            trainer.train_batch = torch.compile(trainer.train_batch, **config.compile.asdict())
        if not config.dry_run:
            trainer.fit()
        if coefficients is not None and run.activations:
            _write_coefficients(run, coefficients)


def _complete(config: TrainConfig) -> None:
    """Fill in what depends on the number of processes, and refuse what cannot be right."""
    world_size = get_world_size()
    batch, micro_batch = config.global_train_batch_size, config.device_train_microbatch_size
    if config.run_name is None:
        raise PolycomError("run_name is missing: give --run_name=NAME")
    if config.precision not in ("amp_bf16", "amp_fp16", "fp32"):
        raise PolycomError(f"precision must be amp_bf16, amp_fp16 or fp32, not {config.precision!r}")
    if batch % world_size:
        raise PolycomError(f"global_train_batch_size {batch} is not a multiple of {world_size} processes")
    if config.distributed_strategy is None:
        raise PolycomError("distributed_strategy must be ddp or fsdp, for one process too")
    if config.distributed_strategy == DistributedStrategy.ddp:
        _complete_ddp(config)
    elif config.fsdp is None:
        raise PolycomError("distributed_strategy fsdp needs the section fsdp")
    config.model.precision = config.precision
    config.device_train_batch_size = batch // world_size
    config.device_train_grad_accum = config.device_train_batch_size // micro_batch
    if config.optimizer.no_decay_norm_and_bias is not None:  # the deprecated name of the two
        decay = not config.optimizer.no_decay_norm_and_bias
        config.optimizer.decay_norm_and_bias = config.optimizer.decay_embeddings = decay
        config.optimizer.no_decay_norm_and_bias = None


def _complete_ddp(config: TrainConfig) -> None:
    if config.ddp is None:
        raise PolycomError("distributed_strategy ddp needs the section ddp, as in --ddp.grad_sync_mode=batch")
    if config.model.init_device == "meta":
        raise PolycomError("distributed_strategy ddp needs model.init_device cpu or cuda, not meta")
    if config.ddp.find_unused_params and config.ddp.grad_sync_mode != DDPGradSyncMode.micro_batch:
        raise PolycomError("ddp.find_unused_params needs ddp.grad_sync_mode micro_batch")
    if config.save_interval_unsharded is None:  # DDP has no shards to save
        config.save_interval_unsharded = config.save_interval
        config.save_num_unsharded_checkpoints_to_keep = config.save_num_checkpoints_to_keep


def _choose_checkpoint(config: TrainConfig) -> bool:
    """Whether training goes on from a checkpoint in save_folder; then that is what will be loaded."""
    folders = (config.save_folder, config.remote_save_folder) if config.try_load_latest_save else ()
    for folder in folders:
        latest = find_latest_checkpoint(folder) if folder is not None else None
        if latest is not None:
            config.load_path = str(latest)
            return True
    return False


def _save_config(config: TrainConfig) -> None:
    if get_global_rank() == 0 and not config.dry_run:
        path = Path(config.save_folder) / "config.yaml"
        if path.exists() and not config.save_overwrite and config.load_path is None:
            raise PolycomError(f"{path} already exists: give another save_folder, or --save_overwrite=true")
        path.parent.mkdir(parents=True, exist_ok=True)
        config.save(path)
    barrier()


def _start_wandb(config: TrainConfig) -> None:
    if config.wandb is not None and (get_global_rank() == 0 or not config.wandb.rank_zero_only):
        folder = Path(config.save_folder) / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        wandb.init(
            dir=folder,
            project=config.wandb.project,
            entity=config.wandb.entity,
            group=config.wandb.group,
            name=config.wandb.name,
            tags=config.wandb.tags,
            config=config.asdict(exclude=["wandb"]),
        )


def _open_indices_file(config: TrainConfig, resumes: bool) -> TextIO | None:
    """Where each rank notes the instances it trained on; a resumed run adds to it."""
    if not config.save_data_indices:
        return None
    path = Path(config.save_folder) / "data-indices" / f"rank{get_global_rank()}.tsv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    return gzip.open(path, "at" if resumes else "wt")


def _distribute(config: TrainConfig, model: OLMo, device: torch.device) -> nn.Module:
    if config.distributed_strategy == DistributedStrategy.ddp:
        return DDP(model.to(device), find_unused_parameters=config.ddp.find_unused_params)
    mesh = None
    if config.fsdp.sharding_strategy in HYBRID:
        replicas = config.fsdp.hybrid_sharding_num_model_replicas or get_world_size() // get_local_world_size()
        if replicas < 1 or get_world_size() % replicas:
            raise PolycomError(
                f"fsdp.hybrid_sharding_num_model_replicas {replicas} does not divide {get_world_size()} processes"
            )
        mesh = init_device_mesh(device.type, (replicas, get_world_size() // replicas))

    def materialise(module: nn.Module) -> None:
        module.to_empty(device=device, recurse=False)

    return FSDP(
        model,
        sharding_strategy=config.fsdp.sharding_strategy,
        mixed_precision=config.fsdp_precision,
        auto_wrap_policy=model.get_fsdp_wrap_policy(config.fsdp.wrapping_strategy),
        use_orig_params=config.fsdp.use_orig_params,
        limit_all_gathers=True,
        device_id=device,
        device_mesh=mesh,
        param_init_fn=materialise,
    )


def _restore_or_save(config: TrainConfig, trainer: Trainer) -> None:
    """Load the checkpoint that is configured; without one, see that the first can be saved and loaded."""
    if config.load_path is not None:
        trainer.restore_checkpoint(
            config.load_path,
            load_optimizer_state=not config.reset_optimizer_state,
            load_trainer_state=not config.reset_trainer_state,
            sharded_checkpointer=config.load_path_sharded_checkpointer,
        )
        log.info(f"Loaded {config.load_path}")
        if config.reset_optimizer_state and not config.reset_trainer_state:
            step = trainer.global_step
            trainer.scheduler = BoltOnWarmupScheduler.wrap(
                trainer.scheduler, step, int(step + config.scheduler.t_warmup)
            )
    elif not config.dry_run and not config.no_pre_train_checkpoint:
        unsharded = (
            config.distributed_strategy == DistributedStrategy.ddp or config.save_num_checkpoints_to_keep == 0
        )
        kind = CheckpointType.unsharded if unsharded else CheckpointType.sharded
        path, cache = trainer.save_checkpoint(kind)
        trainer.restore_checkpoint(path, checkpoint_type=kind, local_cache=cache)
    if config.force_save_unsharded and config.distributed_strategy == DistributedStrategy.fsdp:
        trainer.save_checkpoint(CheckpointType.unsharded)


def _with_coefficients(config: TrainConfig, model: OLMo) -> dict[str, nn.Module]:
    if not parse(str(config.model.activation_type))[0].coefficients:
        return {}
    return {name: module for name, module in model.named_modules() if name.endswith(".act")}


def _write_coefficients(run: Run, path: Path) -> None:
    """Gather the coefficients, which FSDP shards with the weights of their block, and write them once."""
    values: dict[str, dict[str, list[float]]] = {}
    units = FSDP.fsdp_modules(run.trainer.dist_model) or [run.trainer.dist_model]
    for unit in units:
        gathered: AbstractContextManager[None] = nullcontext()
        if isinstance(unit, FSDP):  # one unit at a time: a whole model might not fit
            gathered = FSDP.summon_full_params(unit, recurse=False, writeback=False)
        with gathered:
            for name, module in run.activations.items():
                for parameter, tensor in module.named_parameters():
                    values.setdefault(name, {}).setdefault(parameter, [])
                    full = tensor.detach().double().flatten().tolist()
                    if len(full) >= len(values[name][parameter]):
                        values[name][parameter] = full
    if get_global_rank() == 0:
        record = {
            "step": run.trainer.global_step,
            "activation": str(run.config.model.activation_type),
            "layers": [{"name": name, **parameters} for name, parameters in values.items()],
        }
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    dist.barrier()
