"""Megatron's TEFusedMLP on Transformer Engine's real Python, over a stand-in for its compiled module; JSON.

POLYCOM_TE_SOURCES names the unpacked wheel. Its layers are made as if there were a GPU, which they ask for.
"""

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron import rehearsal
from tests.integrations.transformer_engine import standin

HIDDEN, WIDTH = 32, 64


def make(activation: str, **options: Any) -> Any:
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=WIDTH,
        num_attention_heads=2,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        polycom_activation=activation,
        **options,
    )
    submodules = MLPSubmodules(te.TELayerNormColumnParallelLinear, te.TERowParallelLinear)
    with mock.patch("torch.cuda.is_available", return_value=True):
        layer: Any = te.TEFusedMLP(config, submodules, ffn_hidden_size=WIDTH)
    torch.manual_seed(1)
    for name, parameter in layer.named_parameters():
        if "linear" in name:
            nn.init.normal_(parameter, std=0.25)
    return layer


def fused_operations(layer: Any) -> Any:
    with mock.patch("torch.cuda.current_device", return_value=0):
        return layer._make_fused_impl()


def fused(layer: Any, x: Tensor) -> Tensor:
    layer._fused_impl = (fused_operations(layer),)
    y, bias = layer(x)
    return y + bias


def separate(layer: Any, x: Tensor) -> Tensor:
    fc1, fc2, functional = layer.linear_fc1, layer.linear_fc2, nn.functional
    x = functional.layer_norm(x, (HIDDEN,), fc1.layer_norm_weight, fc1.layer_norm_bias, fc1.eps)
    return functional.linear(
        layer.activation_func(functional.linear(x, fc1.weight, fc1.bias)), fc2.weight, fc2.bias
    )


def difference(activation: str) -> float:
    """The worst of output and gradients."""
    results = []
    for compute in (fused, separate):
        layer = make(activation)
        torch.manual_seed(2)
        x = torch.randn(8, 2, HIDDEN).requires_grad_()
        y = compute(layer, x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
        assert all(found is not None for found in results[-1])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))


def refusal(activation: str) -> str:
    try:
        fused(make(activation), torch.zeros(8, 2, HIDDEN))
    except PolycomError as error:
        return str(error)
    return ""


def recomputes(**options: Any) -> bool:
    """Whether TE is told to keep no result of the activation under a quantised recipe either."""
    activation = fused_operations(make("polynorm", **options))[3]
    return bool(activation.activation_recompute_in_mlp)


def main() -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    recompute: Any = {"recompute_granularity": "selective", "recompute_modules": ["mlp_act"]}
    print(
        json.dumps(
            {
                "differences": {name: difference(name) for name in ("polynorm", "polyrelu", "xielu")},
                "keys": sorted(make("polynorm").state_dict()),
                "nothing to learn": refusal("mish"),
                "recomputed": [recomputes(), recomputes(**recompute)],
            }
        )
    )


if __name__ == "__main__":
    standin.install(Path(os.environ["POLYCOM_TE_SOURCES"]))
    standin.without_driver()
    rehearsal.enable()
    main()
