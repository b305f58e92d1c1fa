"""Compare Megatron's TEGroupedMLP with its SequentialMLP on the same weights; prints the differences as JSON.

The class is the real one; only its linear layers, compiled for GPUs by Transformer Engine, are torch's here.
"""

import json

import torch

from polycom_ext.integrations.megatron import rehearsal

EXPERTS, HIDDEN, WIDTH = 3, 16, 24


class GroupedLinear(torch.nn.Module):
    """One linear layer an expert, with the interface of Transformer Engine's."""

    def __init__(self, experts: int, input_size: int, output_size: int, **options: object) -> None:
        super().__init__()
        for i in range(experts):
            self.register_parameter(
                f"weight{i}", torch.nn.Parameter(torch.randn(output_size, input_size) / 4)
            )

    def forward(self, x: torch.Tensor, tokens_per_expert: list[int]) -> tuple[torch.Tensor, None]:
        parts = torch.split(x, tokens_per_expert)
        weights = [getattr(self, f"weight{i}") for i in range(len(parts))]
        return torch.cat([part @ weight.T for part, weight in zip(parts, weights, strict=True)]), None


def main() -> None:
    rehearsal.enable()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, SequentialMLP, TEGroupedMLP
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=WIDTH,
        moe_ffn_hidden_size=WIDTH,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        add_bias_linear=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        polycom_activation="polynorm",
    )
    grouped = TEGroupedMLP(
        EXPERTS, config, GroupedMLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear), groups
    )
    sequential = SequentialMLP(
        EXPERTS, config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear), groups
    )
    with torch.no_grad():
        for i, expert in enumerate(sequential.local_experts):
            expert.linear_fc1.weight.copy_(getattr(grouped.linear_fc1, f"weight{i}"))
            expert.linear_fc2.weight.copy_(getattr(grouped.linear_fc2, f"weight{i}"))
    tokens = torch.tensor([5, 0, 7])
    x, probs = torch.randn(12, HIDDEN), torch.rand(12)
    results = []
    for experts in (grouped, sequential):
        leaf = x.clone().requires_grad_()
        y, _ = experts(leaf, tokens, probs)
        y.square().sum().backward()
        activation = experts.activation_func
        results.append([y.detach(), leaf.grad, activation.weight.grad, activation.bias.grad])
    keys = [
        sorted(
            entry.key for entry in experts.sharded_state_dict("mlp.experts.").values() if "activ" in entry.key
        )
        for experts in (grouped, sequential)
    ]
    names = ("y", "dx", "dweight", "dbias")
    differences = {name: float((a - b).norm() / b.norm()) for name, a, b in zip(names, *results, strict=True)}
    parameters = [
        sum("activation" in name for name, _ in experts.named_parameters())
        for experts in (grouped, sequential)
    ]
    print(json.dumps({"differences": differences, "keys": keys, "parameters": parameters}))


if __name__ == "__main__":
    main()
