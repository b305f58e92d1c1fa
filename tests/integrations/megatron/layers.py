"""Single layers of Megatron's, run and compared on one process; prints what was found as one line of JSON.

The classes are the real ones, but for grouped linear layers, which Transformer Engine compiles for GPUs, and
torch's stand in for.
"""

import contextlib
import json
from types import MethodType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

EXPERTS, HIDDEN, WIDTH = 3, 16, 256
TOKENS = [25, 0, 39]
ACTIVATIONS = ["polynorm", "polyrelu", "polyprelu", "gelu"]


class GroupedLinear(nn.Module):
    """One linear layer an expert, with the interface of Transformer Engine's."""

    def __init__(
        self, experts: int, input_size: int, output_size: int, bias: bool, skip_bias_add: bool, **options: Any
    ) -> None:
        super().__init__()
        self.experts, self.has_bias, self.skip_bias_add = experts, bias, skip_bias_add
        for i in range(experts):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.randn(output_size, input_size) / 4))
            if bias:
                self.register_parameter(f"bias{i}", nn.Parameter(torch.randn(output_size)))

    def forward(self, x: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, list[Tensor] | None]:
        parts = torch.split(x, tokens_per_expert)
        weights = [getattr(self, f"weight{i}") for i in range(self.experts)]
        y = torch.cat([part @ weight.T for part, weight in zip(parts, weights, strict=True)])
        if not self.has_bias:
            return y, None
        biases = [getattr(self, f"bias{i}") for i in range(self.experts)]
        if self.skip_bias_add:
            return y, biases
        counts = torch.tensor(tokens_per_expert)
        return y + torch.stack(biases).repeat_interleave(counts, dim=0), None


def make(kind: str, activation: str, **options: Any) -> Any:
    """A layer with biases, whose parameters depend on its kind only."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, SequentialMLP, TEGroupedMLP
    from megatron.core.transformer.transformer_config import TransformerConfig

    class Fc2(RowParallelLinear):
        """Gives a copy: upstream adds an expert's bias to a view, in place, on one process."""

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            y, bias = super().forward(x)
            return y.clone(), bias

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=WIDTH,
        moe_ffn_hidden_size=None if kind == "dense" else WIDTH,
        num_attention_heads=2,
        num_moe_experts=None if kind == "dense" else EXPERTS,
        moe_grouped_gemm=kind == "grouped",
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        polycom_activation=activation,
        **options,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    torch.manual_seed(1)
    layer: nn.Module
    if kind == "dense":
        layer = MLP(config, MLPSubmodules(ColumnParallelLinear, RowParallelLinear), ffn_hidden_size=WIDTH)
    elif kind == "sequential":
        layer = SequentialMLP(EXPERTS, config, MLPSubmodules(ColumnParallelLinear, Fc2), groups)
    else:
        layer = TEGroupedMLP(EXPERTS, config, GroupedMLPSubmodules(GroupedLinear, GroupedLinear), groups)
    torch.manual_seed(2)
    for name, parameter in layer.named_parameters():
        if "linear" in name:
            nn.init.normal_(parameter, std=0.25)
    return layer


def of_two_sums(activation: Any) -> None:
    """Take the seam out: x + bias, the registry's module, times the weights, each an operation of its own."""
    registered: Any = type(activation).__mro__[2]
    plain = MethodType(registered.forward, activation)

    def forward(
        x: Tensor,
        bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        tokens_per_expert: list[int] | None = None,
    ) -> Tensor:
        if bias is not None and bias.dim() == 2:
            bias = bias.repeat_interleave(torch.tensor(tokens_per_expert), dim=0)
        if bias is not None:
            x = x + bias
        y: Tensor = plain(x)
        return y if token_weight is None else (y * token_weight.unsqueeze(-1)).to(y.dtype)

    activation.forward = forward


class Passes(TorchDispatchMode):
    """Notes what writes a tensor of FC1's output's width, but for matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        y = found[0] if isinstance(found, tuple | list) and found else found
        if isinstance(y, Tensor) and y.dim() and y.shape[-1] == WIDTH and not func.is_view:
            self.names.append(str(func).partition(".")[2].partition(".")[0])
        return found


def passes(kind: str, activation: str) -> list[str]:
    """What runs between FC1 and FC2, forward, by name."""
    layer = make(kind, activation)
    x, probs = torch.randn(4, HIDDEN), torch.rand(4)
    counts = torch.tensor([4, 0, 0])
    noted = Passes()
    with torch.no_grad(), noted:
        layer(x) if kind == "dense" else layer(x, counts, probs)
    return noted.names


def run(kind: str, layer: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], int]:
    """The output and every gradient by name, and how many tensors of FC1's output's size are kept."""
    layer.to(dtype)
    torch.manual_seed(3)
    x = torch.randn(sum(TOKENS), HIDDEN, dtype=dtype).requires_grad_()
    probs = torch.rand(sum(TOKENS)).requires_grad_()  # float32, as --moe-router-dtype fp32 has them
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, bias = layer(x) if kind == "dense" else layer(x, torch.tensor(TOKENS), probs)
    parameters = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
    size = sum(storage.nbytes() for key, storage in kept.items() if key not in parameters)
    kept.clear()
    (y if bias is None else y + bias).float().square().sum().backward()
    found = {"y": y.detach(), "dx": x.grad, "dprobs": probs.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return (
        {name: tensor for name, tensor in found.items() if tensor is not None},
        size // (sum(TOKENS) * WIDTH * x.element_size()),
    )


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The worst relative error in norm, of equal names and types."""
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    return max(
        float((found[name] - other).double().norm() / other.double().norm().clamp_min(1e-30))
        for name, other in expected.items()
    )


def fused_and_not(kind: str, activation: str, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """How far the seam is from separate operations, and what each keeps."""
    layer = make(kind, activation, **options)
    found, kept = run(kind, layer, dtype)
    layer = make(kind, activation, **options)
    of_two_sums(layer.activation_func)
    expected, kept_without = run(kind, layer, dtype)
    return {"difference": difference(found, expected), "kept": [kept, kept_without], "names": sorted(found)}


def recomputed(kind: str, activation: str) -> dict[str, Any]:
    """What an output-discarding checkpoint changes, in what is kept and in the numbers."""
    module = "moe_act" if kind == "grouped" else "mlp_act"
    expected, _ = run(kind, make(kind, activation))
    layer = make(kind, activation, recompute_granularity="selective", recompute_modules=[module])
    found, kept = run(kind, layer)
    with torch.no_grad():  # an evaluation has nothing to recompute for
        again = layer(torch.ones(4, HIDDEN))[0] if kind == "dense" else None
    return {
        "difference": difference(found, expected),
        "kept": kept,
        "evaluates": again is None or bool(again.isfinite().all()),
    }


def of_both_experts() -> dict[str, Any]:
    """TEGroupedMLP beside SequentialMLP, on the same weights."""
    grouped, sequential = make("grouped", "polynorm"), make("sequential", "polynorm")
    with torch.no_grad():
        for i, expert in enumerate(cast(nn.ModuleList, sequential.local_experts)):
            for linear in ("linear_fc1", "linear_fc2"):
                for name in ("weight", "bias"):
                    getattr(getattr(expert, linear), name).copy_(
                        getattr(getattr(grouped, linear), f"{name}{i}")
                    )
    results = [run(*pair)[0] for pair in (("grouped", grouped), ("sequential", sequential))]
    shared = ("y", "dx", "dprobs", "activation_func.weight", "activation_func.bias")
    found, expected = ({name: result[name] for name in shared} for result in results)
    keys = [
        sorted(
            entry.key
            for entry in cast(Any, experts).sharded_state_dict("mlp.experts.").values()
            if "activ" in entry.key
        )
        for experts in (grouped, sequential)
    ]
    parameters = [
        sum("activation" in name for name, _ in experts.named_parameters())
        for experts in (grouped, sequential)
    ]
    return {"difference": difference(found, expected), "keys": keys, "parameters": parameters}


def _without_transformer_engine(random: Any) -> None:
    """Its part in an output-discarding checkpoint, outside of FP8: none."""
    random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
    random.activation_recompute_forward = random.fp8_autocast = lambda **_: contextlib.nullcontext()


def main() -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    random.model_parallel_cuda_manual_seed(1)
    _without_transformer_engine(random)
    kinds = ("dense", "sequential", "grouped")
    print(
        json.dumps(
            {
                "fused": {
                    f"{kind}, {activation}, {str(dtype).removeprefix('torch.')}": fused_and_not(
                        kind, activation, dtype
                    )
                    for kind in kinds
                    for activation in ACTIVATIONS
                    for dtype in (torch.float32, torch.bfloat16)
                },
                "weights on the input": {
                    kind: fused_and_not(
                        kind,
                        "polyrelu",
                        torch.float32,
                        moe_apply_probs_on_input=True,
                        moe_router_topk=1,
                        moe_router_pre_softmax=True,
                    )
                    for kind in kinds[1:]
                },
                "recomputed": {
                    f"{kind}, {activation}": recomputed(kind, activation)
                    for kind in kinds
                    for activation in ACTIVATIONS
                },
                "experts": of_both_experts(),
                "passes": {f"{kind}, {name}": passes(kind, name) for kind in kinds for name in ACTIVATIONS},
            }
        )
    )


if __name__ == "__main__":
    main()
