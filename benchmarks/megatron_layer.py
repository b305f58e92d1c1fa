"""What forming FC1's bias and the router's weights with the activation saves in a whole layer of Megatron's.

    python benchmarks/megatron_layer.py                     # on a CPU, in .upstream/megatron, patched
    python benchmarks/megatron_layer.py --threads 2 --output benchmarks/results/DATE-cpu-megatron-layer

`fused` is the layer as it is, `separate` the same layer with x + bias, activation and product one after the
other. They take turns. Modes: `dense` (an MLP with biases), `expert` (an MLP without, with the router's
weights), and of each the activation's step alone; forward and backward through autograd. Times are the
process's processor time, which what else runs on a machine disturbs less than the clock. Writes OUTPUT.csv, a
row a provider, mode and type with p20, p50 and p80, and OUTPUT.md. MALLOC_… as in activations.py.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polycom_ext import activations, upstream
from polycom_ext.integrations.megatron import rehearsal
from polycom_ext.machine.processor import processor

PROVIDERS = ("fused", "separate")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def separately(module: Any, plain: Any, x: Tensor, bias: Tensor | None, weights: Tensor | None) -> Tensor:
    """The same function as three operations; `plain` shares the module's parameters."""
    y: Tensor = plain(x if bias is None else x + bias)
    return y if weights is None else (y * weights.unsqueeze(-1)).to(y.dtype)


def layer(arguments: argparse.Namespace, mode: str, dtype: torch.dtype) -> Any:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=arguments.hidden,
        ffn_hidden_size=arguments.width,
        num_attention_heads=1,
        add_bias_linear=mode == "dense",
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        polycom_activation=arguments.activation,
    )
    submodules = MLPSubmodules(ColumnParallelLinear, RowParallelLinear)
    return MLP(config, submodules, ffn_hidden_size=arguments.width).to(dtype)


def calls(arguments: argparse.Namespace, mode: str, dtype: torch.dtype) -> dict[tuple[str, str], Any]:
    """(provider, part) -> forward and backward of it."""
    mlp = layer(arguments, mode, dtype)
    module = mlp.activation_func
    plain = activations.build(arguments.activation)
    for name, _ in plain.named_parameters():
        setattr(plain, name, getattr(module, name))
    steps: dict[str, Callable[..., Tensor]] = {
        "fused": module.forward,
        "separate": lambda *given: separately(module, plain, *given),
    }
    x = torch.randn(arguments.tokens, arguments.hidden, dtype=dtype, requires_grad=True)
    wide = torch.randn(arguments.tokens, arguments.width, dtype=dtype, requires_grad=True)
    weights = torch.rand(arguments.tokens).requires_grad_() if mode == "expert" else None
    bias = mlp.linear_fc1.bias if mode == "dense" else None
    grad, grad_wide = torch.randn_like(x), torch.randn_like(wide)

    def clear() -> None:
        mlp.zero_grad()
        for tensor in (x, wide, weights):
            if tensor is not None:
                tensor.grad = None

    def whole(step: Callable[..., Tensor]) -> None:
        clear()
        module.forward = step
        mlp(x, weights)[0].backward(grad)

    def alone(step: Callable[..., Tensor]) -> None:
        clear()
        step(wide, bias, weights).backward(grad_wide)

    return {
        (provider, part): (lambda run=run, step=step: run(step))
        for provider, step in steps.items()
        for part, run in (("layer", whole), ("activation", alone))
    }


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for mode in ("dense", "expert"):
        for dtype in DTYPES:
            timed = calls(arguments, mode, DTYPES[dtype])
            times: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
            for turn in range(arguments.repetitions + 2):
                keys = list(timed)
                for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
                    start = time.process_time()
                    timed[key]()
                    if turn >= 2:
                        times[key].append((time.process_time() - start) * 1e3)
            for (provider, part), found in times.items():
                tenths = statistics.quantiles(found, n=10, method="inclusive")
                quantiles = {f"p{10 * n}_ms": tenths[n - 1] for n in (2, 5, 8)}
                rows.append({"provider": provider, "mode": mode, "part": part, "dtype": dtype, **quantiles})
    return rows


def table(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    by = {(row["mode"], row["part"], row["dtype"], row["provider"]): row for row in rows}
    kept = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    lines = [
        f"# FC1's bias and the router's weights in {arguments.activation}, in Megatron's MLP",
        "",
        f"{datetime.date.today()}, {processor()}, torch {torch.__version__}, {arguments.threads} thread(s), "
        f"load average {os.getloadavg()[0]:.1f} at the end. {arguments.tokens} tokens, hidden "
        f"{arguments.hidden}, width {arguments.width}; forward and backward, milliseconds of "
        f"processor time, p20 (p50, p80) of {arguments.repetitions} turns.",
        "",
        f"    {' '.join([*kept, shlex.join(['python', *sys.argv])])}",
        "",
        "| layer | part | type | fused | separate | separate / fused (p20) |",
        "|---|---|---|---|---|---|",
    ]
    for mode, part, dtype in dict.fromkeys(key[:3] for key in by):
        found = [by[mode, part, dtype, provider] for provider in PROVIDERS]
        texts = [f"{row['p20_ms']:.2f} ({row['p50_ms']:.2f}, {row['p80_ms']:.2f})" for row in found]
        ratio = found[1]["p20_ms"] / found[0]["p20_ms"]
        lines.append(f"| {mode} | {part} | {dtype} | {' | '.join(texts)} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--activation", default="polynorm")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--short", action="store_true", help="little of everything")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="without an ending; else only the table is printed")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.tokens, arguments.hidden, arguments.width, arguments.repetitions = 8, 32, 64, 2
    torch.set_num_threads(arguments.threads)
    sys.path.insert(0, str(upstream.ensure_applied("megatron")))
    rehearsal.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    rows = measure(arguments)
    text = table(rows, arguments)
    print(text)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with arguments.output.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        arguments.output.with_suffix(".md").write_text(text)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
