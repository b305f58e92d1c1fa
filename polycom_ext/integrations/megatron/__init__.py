"""Megatron-LM (megatron-core 0.17.1): what the patches in patches/megatron call, and a training entry.

`config.prepare_config` checks a TransformerConfig, `activation.build_activation` makes the module of an MLP
or of an expert block, `activation.share_activation` gives a block's experts one module; `pretrain` trains.
"""
