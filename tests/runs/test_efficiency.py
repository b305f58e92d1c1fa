"""Tokens a second, MFU and memory: what they are reckoned from, and how they are shown."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from polycom_ext import upstream
from polycom_ext.cli import main
from polycom_ext.machine.peaks import peak_flops
from polycom_ext.runs import record
from polycom_ext.runs.efficiency import Efficiency, model_flops
from polycom_ext.runs.record import Record

from .conftest import register, write_spec


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),  # a seventh of it, or less
        ("NVIDIA A10", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA H100 of tomorrow", None),
    ],
)
def test_a_gpu_has_the_peak_of_its_datasheet_or_none(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)


def megatrons_count(**options: Any) -> float:
    """FLOPs of a sequence by upstream's own function, of a model without state-space or linear attention."""
    source = (upstream.ensure_applied("megatron") / "megatron" / "training" / "training.py").read_text()
    (function,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "num_floating_point_operations"
    )
    names: dict[str, Any] = {
        name: lambda _: False for name in ("is_hybrid_model", "is_linear_attention_variant")
    }
    exec(compile(ast.Module([function], []), "training.py", "exec"), names)
    absent = ("mtp_num_layers", "moe_latent_size", "moe_shared_expert_intermediate_size", "num_experts")
    off = ("multi_latent_attention", "attention_output_gate", "experimental_attention_variant")
    defaults = dict.fromkeys(absent) | dict.fromkeys(off, False)
    return float(names["num_floating_point_operations"](SimpleNamespace(**{**defaults, **options}), 1))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("experts", [False, True])
def test_the_formula_is_megatrons(gated: bool, groups: int, experts: bool) -> None:
    model: dict[str, Any] = {
        "num_layers": 3,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "kv_channels": 24,
        "group_query_attention": groups < 4,
        "num_query_groups": groups,
        "ffn_hidden_size": 96,
        "swiglu": gated,
        "seq_length": 32,
        "padded_vocab_size": 128,
        "moe_ffn_hidden_size": 40,
        "moe_layer_freq": [0, 1, 1],
        "moe_router_topk": 2,
    }
    matrices = 3 if gated else 2
    attention = 64 * 24 * (2 * 4 + 2 * groups)
    ffn = 3 * matrices * 64 * 96
    if experts:
        model |= {"num_experts": 8, "moe_shared_expert_intermediate_size": 48}
        ffn = matrices * 64 * (96 + 2 * (2 * 40 + 48))
    weights = 3 * attention + ffn + 64 * 128
    assert (
        model_flops(weights, layers=3, attention_width=4 * 24, sequence=32) == megatrons_count(**model) / 32
    )


def test_status_shows_the_share_of_the_peak_and_of_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(monkeypatch, tmp_path)
    run = Record(tmp_path / "run")
    run.path.mkdir()
    run.spec.write_text(Path(write_spec("toy", 1, {})).read_text())
    used = Efficiency("NVIDIA H100 80GB HBM3", 8, flops_per_token=6e9, peak_flops=989e12)
    used.write(run)
    for step in (1, 2):
        metrics = used.metrics(500_000.0) | {record.STEP_SECONDS: 1.0, record.PEAK_MEMORY: 61.5 * 2**30}
        record.append(run.metrics, step, metrics)
    assert main(["status", str(run.path)]) == 0
    shown = capsys.readouterr().out
    assert "1.00 s/step, 500000 tokens/s" in shown
    assert "MFU 37.9% of 8 · 989 TFLOP/s, NVIDIA H100 80GB HBM3 in dense bfloat16" in shown
    assert "61.5 GiB of memory at most" in shown
    assert main(["status", str(run.path), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["mfu"] == pytest.approx(6e9 * 500_000 / (8 * 989e12))
    assert told["peak_memory_bytes"] == 61.5 * 2**30
