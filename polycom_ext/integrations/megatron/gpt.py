"""A GPT model (dense or MoE, with or without MTP), its data and its loss, as megatron.training wants them.

Imports Megatron; on a CPU `rehearsal.enable()` comes first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.transformer.spec_utils import import_module
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import (
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    get_blend_and_blend_per_split,
    is_first_or_last_pipeline_stage,
)
from torch import Tensor

from polycom_ext import files


def build_model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    """The model that the arguments describe; the stage of it that belongs to this rank."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    use_te = args.transformer_impl == "transformer_engine"
    spec_options = {
        "use_transformer_engine": use_te,
        "normalization": args.normalization,
        "qk_l2_norm": args.qk_l2_norm,
        "vp_stage": vp_stage,
    }
    if args.spec is not None:
        layer_spec = import_module(args.spec)
    else:
        layer_spec = get_gpt_decoder_block_spec(config, **spec_options)
    mtp_spec = None
    if args.mtp_num_layers is not None:
        last_layer = get_gpt_decoder_layer_specs(config, **spec_options)[-1]
        mtp_spec = get_gpt_mtp_block_spec(
            config, last_layer, use_transformer_engine=use_te, vp_stage=vp_stage
        )
    return GPTModel(
        config=config,
        transformer_layer_spec=layer_spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        mtp_block_spec=mtp_spec,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def compute_loss(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the masked token losses, the number of tokens, and both for the log."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    if get_args().check_for_nan_in_loss_and_grad:
        for name, test in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=test,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    tokens = mask.sum().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}


def forward_step(data_iterator: Iterator[Any], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """One micro-batch through this rank's stage, and the function that turns its output into a loss."""
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    config = get_attr_wrapped_model(model, "config")
    with_mtp = mtp_on_this_rank(config, ignore_virtual=False, vp_stage=vp_stage)
    names = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
    batch: dict[str, Any] = dict.fromkeys(names)
    if is_first_or_last_pipeline_stage(vp_stage) or with_mtp:
        whole = get_batch_on_this_tp_rank(data_iterator, mtp_on_this_rank=with_mtp)
        batch = get_batch_on_this_cp_rank({name: whole[name] for name in names})
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(compute_loss, batch["loss_mask"])


def build_datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Training, validation and test sets from Megatron's indexed datasets."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
    transformer_config = core_transformer_config_from_args(args)

    def on_this_rank() -> bool:
        return parallel_state.get_tensor_model_parallel_rank() == 0 and (
            is_first_or_last_pipeline_stage(vp_stage)
            or mtp_on_this_rank(transformer_config, ignore_virtual=False, vp_stage=vp_stage)
        )

    print_rank_0("> building train, validation, and test datasets")
    dataset = MockGPTDataset if args.mock_data else GPTDataset
    with _one_run_at_a_time(args.data_cache_path):
        return BlendedMegatronDatasetBuilder(dataset, num_samples, on_this_rank, config).build()


@contextlib.contextmanager
def _one_run_at_a_time(cache: str | None) -> Iterator[None]:
    """Hold --data-cache-path against other runs, which would take a half-written index for a whole one.

    The first rank writes to it, the others wait for that. Where it cannot write there is nothing to hold.
    """
    with contextlib.ExitStack() as held:
        if cache is not None and torch.distributed.get_rank() == 0:
            with contextlib.suppress(OSError):
                os.makedirs(cache, exist_ok=True)
                files.lock(held.enter_context(open(os.path.join(cache, ".lock"), "ab")), wait=True)
        yield


build_datasets.is_distributed = True  # type: ignore[attr-defined]  # read by megatron.training


def embedding_ranks(pipeline_ranks: list[int]) -> list[int]:
    """Pipeline ranks that hold (a copy of) the word embedding."""
    ranks = {pipeline_ranks[0]}
    if len(pipeline_ranks) > 1:
        args = get_args()
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pipeline_ranks[-1])
        ranks.update(get_mtp_ranks(pipeline_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)
