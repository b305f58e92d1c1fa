"""Checkpoints written for Megatron: what is read back is what was written, and what it lacks is refused."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from polycom_ext import activations, cli
from polycom_ext.checkpoints.constants import described
from polycom_ext.checkpoints.forms import Options
from polycom_ext.checkpoints.model import Model, checked, shapes
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron.conversion import CHECKPOINTS

PLAIN: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64},
    **{"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    **{"rms_norm_eps": 1e-5, "rope_theta": 5000.0, "initializer_range": 0.02},
    "activation": {"name": "polynorm", "gated": False, "order": 3, "eps": 1e-6},
    "norm": {"kind": "rms", "affine": True, "bias": False},
    **{"norm_after": False, "qk_norm": None, "clip_qkv": None},
    **{"num_experts": 0, "num_experts_per_tok": 0, "norm_topk_prob": False},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SWIGLU = {"activation": {"name": "swiglu", "gated": True}}
LAYER_NORM = {"kind": "layer", "affine": True, "bias": True}
KINDS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "grouped queries": {"num_key_value_heads": 2},
    "wide heads": {"head_dim": 16},
    "normalised queries": {"qk_norm": "head"},
    "layer norm": {"norm": LAYER_NORM},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "gated with biases": {**SWIGLU, "attention_bias": True, "mlp_bias": True},
    "experts": EXPERTS,
    "experts, normalised router": {**EXPERTS, "norm_topk_prob": True},
    "gated experts": {**EXPERTS, **SWIGLU},
}
"""What differs from PLAIN."""

KINDS |= {name: {"activation": described(name)} for name in activations.REGISTRY}
KINDS |= {name: {"activation": described(name)} for name in ("polynorm-4", "polyrelu-2")}


def made(kind: str, **more: Any) -> Model:
    """A model with random weights."""
    config = {**PLAIN, **KINDS.get(kind, {}), **more}
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in shapes(config).items()}
    return Model(config, {name: partial(tensors.__getitem__, name) for name in tensors}, kind)


def written(model: Model, folder: Path, **options: Any) -> Model:
    """What is read of what was written."""
    folder.mkdir()
    CHECKPOINTS.write(model, folder, Options(**options), lambda size: None)
    found = CHECKPOINTS.find(folder)
    assert found is not None
    return checked(CHECKPOINTS.read(found.path))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_was_written(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    again = written(model, tmp_path / "megatron", shard_bytes=20000)
    assert again.config == model.config
    assert list(again.tensors) == list(checked(model).tensors)
    for name, read in model.tensors.items():
        assert torch.equal(again.tensors[name](), read()), name
    assert len(list((tmp_path / "megatron" / "release").glob("*.distcp"))) > 1


def test_torch_reads_what_was_written(tmp_path: Path) -> None:
    model = made("grouped queries")
    written(model, tmp_path / "megatron")
    release = tmp_path / "megatron" / "release"
    name = "decoder.layers.mlp.linear_fc2.weight"
    about = FileSystemReader(release).read_metadata().state_dict_metadata[name]
    assert isinstance(about, TensorStorageMetadata)
    assert (about.size, about.properties.dtype) == (torch.Size([3, 32, 48]), torch.float32)
    stack = {name: torch.empty(3, 32, 48)}
    torch.distributed.checkpoint.load(stack, checkpoint_id=release, no_dist=True)
    for layer, tensor in enumerate(stack[name]):
        assert torch.equal(tensor, model.tensors[f"model.layers.{layer}.mlp.down_proj.weight"]())


def test_a_wish_for_a_type_leaves_the_coefficients_float32(tmp_path: Path) -> None:
    again = written(made("experts"), tmp_path / "megatron", dtype="bfloat16")
    types = {name: read().dtype for name, read in again.tensors.items()}
    assert {kind for name, kind in types.items() if "act_fn" in name} == {torch.float32}
    assert {kind for name, kind in types.items() if "act_fn" not in name} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("kind", "changed", "said"),
    [
        ("polynorm", {"norm": {"kind": "layer", "affine": False, "bias": False}}, "norm without weights"),
        ("polynorm", {"norm": {"kind": "layer", "affine": True, "bias": False}}, "and without biases"),
        ("polynorm", {"qk_norm": "row"}, "over all heads"),
        ("layer norm", {"qk_norm": "head"}, "LayerNorm of queries and keys"),
        ("polynorm", {"norm_after": True}, "norms behind attention and FFN"),
        ("polynorm", {"clip_qkv": 8.0}, "clip_qkv"),
        ("polynorm", {"attention_bias": True}, "biases in attention or in the FFN alone"),
        ("experts", {"attention_bias": True, "mlp_bias": True}, "biases of experts"),
        ("experts", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "router that gives"),
        ("polynorm", {"activation": {**PLAIN["activation"], "eps": 1e-5}}, "polynorm (order 3, eps 1e-05)"),
    ],
)
def test_what_megatron_lacks_is_refused(
    kind: str, changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(PolycomError, match="Megatron has no") as refused:
        CHECKPOINTS.write(made(kind, **changed), tmp_path, Options(), lambda size: None)
    assert said in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_block_of_another_type_is_refused(tmp_path: Path) -> None:
    model = made("polynorm")
    name = "model.layers.1.mlp.down_proj.weight"
    mixed = {**model.tensors, name: lambda: model.tensors[name]().half()}
    with pytest.raises(
        PolycomError, match=r"linear_fc2\.weight would be of torch\.float32 .* torch\.float16"
    ):
        CHECKPOINTS.write(Model(model.config, mixed, ""), tmp_path, Options(), lambda size: None)
    assert not (tmp_path / "release" / ".metadata").exists()


def run_of(folder: Path, steps: list[int]) -> Path:
    """A run's directory with a checkpoint at each step, of which the last is the newest."""
    written(made("polynorm"), folder / "one")
    checkpoints = folder / "run" / "checkpoints"
    for step in steps:
        shutil.copytree(folder / "one" / "release", checkpoints / f"iter_{step:07d}")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(steps[-1]))
    return folder / "run"


@pytest.mark.parametrize("damaged", ["__0_0.distcp", ".metadata", "common.pt", "metadata.json"])
def test_a_damaged_newest_checkpoint_is_passed_over(
    damaged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, [2, 4])
    file = run / "checkpoints" / "iter_0000004" / damaged
    file.write_bytes(file.read_bytes()[:-30])
    assert cli.main(["convert", str(run), str(tmp_path / "out"), "--to", "megatron"]) == 0
    said = capsys.readouterr()
    (line,) = (line for line in said.err.splitlines() if "passed over" in line)
    assert f"iter_0000004 holds {damaged}" in line
    assert "iter_0000002" in said.out


def test_a_run_without_a_whole_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, [2, 4])
    for shard in run.rglob("*.distcp"):
        shard.unlink()
    assert cli.main(["convert", str(run), str(tmp_path / "out"), "--to", "megatron"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no checkpoint is whole" in said
    assert "iter_0000004 lacks" in said
    assert "iter_0000002 lacks" in said


def test_the_manifest_names_every_file(tmp_path: Path) -> None:
    written(made("polynorm"), tmp_path / "first")
    source, target = str(tmp_path / "first"), tmp_path / "second"
    assert cli.main(["convert", source, str(target), "--to", "megatron"]) == 0
    listed = json.loads((target / "conversion.json").read_text())["sha256"]
    there = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert listed.keys() == there - {"conversion.json"}
    assert "release/.metadata" in listed
