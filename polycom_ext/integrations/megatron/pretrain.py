"""Pre-train a GPT model (dense or MoE) with Megatron's own training loop.

    torchrun --nproc-per-node N -m polycom_ext.integrations.megatron.pretrain MEGATRON-OPTIONS

megatron-core's wheel holds `megatron.training` but no script to call it; this is that script, for GPT pre-
training from indexed datasets. Every option is upstream's; `--polycom-metrics FILE` is ours. Upstream's own
pretrain_gpt.py works as well, in a patched checkout of the whole repository: the MLP builds the activation.

Megatron is imported in `main`: on a CPU the rehearsal comes first, and the processes that write checkpoints
import this module without needing any of it.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron import data_helpers, rehearsal
from polycom_ext.runs import efficiency, entry
from polycom_ext.runs.record import Record


def _add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group(title="polycom")
    group.add_argument(
        "--polycom-metrics", default=None, metavar="FILE", help="Append metrics to FILE as JSON."
    )
    return parser


ASSERTED = (AssertionError, ValueError, PolycomError)
"""How upstream and PolyCom say that arguments cannot be right."""


def _refusing(
    function: Callable[..., Any], errors: tuple[type[Exception], ...] = ASSERTED
) -> Callable[..., Any]:
    """Turn what is asserted about the arguments into one sentence and exit status 2."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except errors as error:
            failed = traceback.extract_tb(error.__traceback__)[-1].line
            entry.refuse(str(error).strip() or str(failed))
            sys.exit(2)

    return call


def _refuse_before_training() -> None:
    """Check the whole configuration before anything is built, and refuse what cannot be built."""
    from megatron.training import get_args, training
    from megatron.training.arguments import core_transformer_config_from_args

    from polycom_ext.integrations.megatron.config import check_arguments

    initialize, get_model = training.initialize_megatron, training.get_model

    def check(*args: Any, **kwargs: Any) -> None:
        initialize(*args, **kwargs)
        check_arguments(get_args(), core_transformer_config_from_args(get_args()))

    training.initialize_megatron = _refusing(check)
    training.get_model = _refusing(get_model)
    training.load_checkpoint = _refusing(training.load_checkpoint, (AssertionError, PolycomError))


def _keep_metrics() -> None:
    """Write what goes to TensorBoard to --polycom-metrics too, on the rank that Megatron logs from."""
    from megatron.training import global_vars, training

    from polycom_ext.integrations.megatron.metrics import MetricsWriter

    set_tensorboard_writer = global_vars._set_tensorboard_writer

    def set_writer(args: argparse.Namespace) -> None:
        set_tensorboard_writer(args)
        if args.polycom_metrics and args.rank == args.world_size - 1:
            global_vars._GLOBAL_TENSORBOARD_WRITER = MetricsWriter(
                Path(args.polycom_metrics), global_vars._GLOBAL_TENSORBOARD_WRITER
            )

    evaluate = training.evaluate_and_print_results

    def evaluate_split(prefix: str, *args: Any, **kwargs: Any) -> Any:
        writer = global_vars.get_tensorboard_writer()
        if not isinstance(writer, MetricsWriter):
            return evaluate(prefix, *args, **kwargs)
        writer.split = "test" if prefix.endswith("test set") else "valid"
        result = evaluate(prefix, *args, **kwargs)
        writer.flush()  # before a checkpoint of this step, from which nobody would evaluate it again
        return result

    train = training.train

    def train_and_note_where(*args: Any, **kwargs: Any) -> Any:
        writer = global_vars.get_tensorboard_writer()
        if isinstance(writer, MetricsWriter):
            writer.begin_after(global_vars.get_args().iteration)
            writer.measure(_efficiency(global_vars.get_args()), global_vars.get_args().seq_length)
        return train(*args, **kwargs)

    log = training.training_log
    signature = inspect.signature(log)

    def log_and_flush(*args: Any, **kwargs: Any) -> Any:
        result = log(*args, **kwargs)
        options, step = global_vars.get_args(), signature.bind(*args, **kwargs).arguments["iteration"]
        measured = options.polycom_metrics and step % options.log_interval == 0
        peak = efficiency.peak_memory() if measured else None  # all ranks take part
        writer = global_vars.get_tensorboard_writer()
        if isinstance(writer, MetricsWriter):
            if peak is not None:
                writer.add_memory(peak)
            writer.flush()
        return result

    global_vars._set_tensorboard_writer = set_writer
    training.training_log = log_and_flush
    training.evaluate_and_print_results = evaluate_split
    training.train = train_and_note_where


def _efficiency(args: argparse.Namespace) -> efficiency.Efficiency:
    """By upstream's own count of what a sequence takes, which is that of `efficiency.model_flops`."""
    from megatron.training import training

    of_a_sequence = training.num_floating_point_operations(args, 1)
    measured = efficiency.Efficiency.here(of_a_sequence / args.seq_length)
    run_dir = os.environ.get(entry.RUN_DIR)
    if run_dir:
        measured.write(Record(Path(run_dir)))
    return measured


def main() -> None:
    """Train; exit status 2 with one sentence when the arguments cannot be right."""
    entry.note_what_argparse_refuses()
    rehearsal.enable()
    data_helpers.enable()
    from megatron.core.enums import ModelType
    from megatron.training import global_vars, pretrain

    from polycom_ext.integrations.megatron import gpt

    _refuse_before_training()
    _keep_metrics()
    with entry.watching_the_disk():
        pretrain(
            gpt.build_datasets,
            gpt.build_model,
            ModelType.encoder_or_decoder,
            gpt.forward_step,
            extra_args_provider=_add_options,
            get_embedding_ranks=gpt.embedding_ranks,
        )
        writer = global_vars.get_tensorboard_writer()
        if writer is not None:
            writer.flush()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
