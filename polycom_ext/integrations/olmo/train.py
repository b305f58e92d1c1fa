"""Pre-train with OLMo's own Trainer, on OLMo 0.6.0 or on its MoE branch.

    torchrun --nproc-per-node N -m polycom_ext.integrations.olmo.train [CONFIG.yaml] [--key.sub=value …]

ai2-olmo's wheel has no scripts; this is that script, and it serves the branch as well. CONFIG and the options
are upstream's TrainConfig; `--polycom-output=DIR`, ours, is where metrics.jsonl and coefficients.json go.
Without `stop_at`, training ends at `max_duration`.

OLMo is imported in `main`: on a CPU the rehearsal comes first.
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from polycom_ext.errors import PolycomError
from polycom_ext.integrations.olmo import rehearsal
from polycom_ext.runs import entry

OUTPUT = "--polycom-output="
UPSTREAMS = (
    ArithmeticError,
    AssertionError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
)
"""What upstream raises, before the first step, for a configuration that nothing here foresaw."""


def main(argv: list[str] | None = None) -> int:
    """Train; exit status 2 with one sentence when the configuration cannot be right."""
    try:
        rehearsal.enable()
        from olmo.exceptions import OLMoConfigurationError

        from polycom_ext.integrations.olmo import loop
    except ModuleNotFoundError as error:
        return _refuse(_missing(error))
    try:
        cfg, output = parse(sys.argv[1:] if argv is None else argv)
        device = _join_ranks()
        trainer = loop.build(cfg, device, output)
    except (OLMoConfigurationError, PolycomError) as error:
        return _refuse(str(error))
    except dist.DistError:
        raise
    except UPSTREAMS as error:
        traceback.print_exc()
        failed = traceback.extract_tb(error.__traceback__)[-1].line
        return _refuse(f"OLMo cannot build this: {type(error).__name__}: {str(error) or failed}")
    try:
        with entry.watching_the_disk():
            loop.train(trainer)
    except (OLMoConfigurationError, PolycomError) as error:
        return _refuse(str(error))
    dist.destroy_process_group()
    return 0


def _refuse(reason: str) -> int:
    entry.refuse(reason)
    return 2


def _missing(error: ModuleNotFoundError) -> str:
    if (error.name or "").partition(".")[0] in ("olmo", "olmo_data", "megablocks"):
        return f"{error.name} is not on PYTHONPATH: start it through `polycom run`"
    return f"{error.name}, which OLMo needs, is not installed: pip install 'polycom-ext[olmo]'"


def parse(arguments: list[str]) -> tuple[Any, Path | None]:
    """The TrainConfig that the arguments describe, checked, and the folder for metrics.

    Raises PolycomError or OLMoConfigurationError for what could not train.
    """
    import olmo.config
    from olmo.util import clean_opt

    from polycom_ext.integrations.olmo.config import check

    options = list(arguments)
    config = options.pop(0) if options and not options[0].startswith("-") else os.devnull
    outputs = [option for option in options if option.startswith(OUTPUT)]
    overrides = [clean_opt(option) for option in options if option not in outputs]
    os.environ.setdefault(
        "OMEGACONF_MAX_YAML_EXPANDED_NODES", "none"
    )  # 10,000: fewer than a corpus has files
    try:
        cfg = olmo.config.TrainConfig.load(config, overrides)
    except FileNotFoundError as error:
        raise PolycomError(f"configuration: {error.filename or error} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PolycomError(f"configuration {config} cannot be read: {error}") from None
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check(cfg, world_size, on_branch=hasattr(olmo.config, "config_to_moe_args"))
    cfg.model.precision = cfg.precision
    cfg.device_train_batch_size = cfg.global_train_batch_size // world_size
    cfg.device_train_grad_accum = cfg.device_train_batch_size // cfg.device_train_microbatch_size
    return cfg, Path(outputs[-1].removeprefix(OUTPUT)) if outputs else None


def _join_ranks() -> torch.device:
    from olmo.torch_util import get_local_rank
    from olmo.util import add_cached_path_clients, prepare_cli_environment

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", get_local_rank())
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timedelta(minutes=30), device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timedelta(minutes=30))
    prepare_cli_environment()
    add_cached_path_clients()
    return device


if __name__ == "__main__":
    sys.exit(main())
