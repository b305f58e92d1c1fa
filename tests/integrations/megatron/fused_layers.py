"""For --spec: layers whose MLP is of Transformer Engine's op fuser, which no option of 0.17.1 asks for."""

from typing import Any

from megatron.core.models.gpt import gpt_layer_specs

spec: Any = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(use_te_op_fuser=True)
