"""Checkpoints of the authors' dense models, rebuilt at a small size in the layout of their Megatron-LM."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM

from polycom_ext import cli

from .conftest import made, tokens

ARGUMENTS: dict[str, Any] = {
    **{"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "kv_channels": 8},
    **{"max_position_embeddings": 64, "norm_epsilon": 1e-5, "rotary_base": 5000, "rotary_percent": 1.0},
    **{"group_query_attention": True, "num_query_groups": 2, "init_method_std": 0.02},
    **{"untie_embeddings_and_output_weights": True, "add_bias_linear": False, "normalization": "RMSNorm"},
    **{"position_embedding_type": "rope", "swiglu": False, "polynorm": False, "polyrelu": False},
    **{"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "rotary_scale_factor": 1},
}


def released(model: Any, folder: Path, **changed: Any) -> Path:
    """What the authors' Megatron-LM would have saved of a model, in bfloat16."""
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    encoder: dict[str, torch.Tensor] = {"final_norm.weight": state["model.norm.weight"]}
    for layer in range(2):
        block, ours = f"layers.{layer}.", f"model.layers.{layer}."
        queries, keys, values = (state[f"{ours}self_attn.{x}_proj.weight"] for x in "qkv")
        grouped = []
        for group in range(2):
            grouped += [queries[16 * group :][:16], keys[8 * group :][:8], values[8 * group :][:8]]
        up = state[f"{ours}mlp.up_proj.weight"]
        if f"{ours}mlp.gate_proj.weight" in state:
            up = torch.cat((state[f"{ours}mlp.gate_proj.weight"], up))
        encoder |= {
            f"{block}input_norm.weight": state[f"{ours}input_layernorm.weight"],
            f"{block}self_attention.query_key_value.weight": torch.cat(grouped),
            f"{block}self_attention.dense.weight": state[f"{ours}self_attn.o_proj.weight"],
            f"{block}post_attention_norm.weight": state[f"{ours}post_attention_layernorm.weight"],
            f"{block}mlp.dense_h_to_4h.weight": up,
            f"{block}mlp.dense_4h_to_h.weight": state[f"{ours}mlp.down_proj.weight"],
        }
        for name in ("weight", "bias"):
            if f"{ours}mlp.act_fn.{name}" in state:
                encoder[f"{block}mlp.activation_func.{name}"] = state[f"{ours}mlp.act_fn.{name}"]
    language_model = {
        "embedding": {"word_embeddings": {"weight": state["model.embed_tokens.weight"]}},
        "encoder": encoder,
        "output_layer": {"weight": state["lm_head.weight"]},
    }
    saved = {
        "args": Namespace(**{**ARGUMENTS, **changed}),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": {"language_model": language_model},
    }
    file = folder / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    torch.save({name: value for name, value in saved.items() if value is not None}, file)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return file


def convert(folder: Path) -> int:
    return cli.main(["convert", str(folder / "released"), str(folder / "hf"), "--to", "hf"])


@pytest.mark.parametrize("name", ["polynorm", "polyrelu", "swiglu"])
def test_they_load_as_the_same_function(name: str, tmp_path: Path) -> None:
    model = made(name)
    released(model, tmp_path / "released", **{name: True})
    assert convert(tmp_path) == 0
    model.load_state_dict({key: tensor.bfloat16().float() for key, tensor in model.state_dict().items()})
    again, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values()), told
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(tokens()).logits, model(tokens()).logits)


def refused(folder: Path, capsys: pytest.CaptureFixture[str], said: str) -> None:
    assert convert(folder) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert {path.name for path in folder.iterdir()} == {"released"}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("tensor_model_parallel_size", 2, "tensor_model_parallel_size 2: only 1 can be read"),
        ("add_bias_linear", True, "add_bias_linear True"),
        ("num_layers", 1, "holds language_model.encoder.layers.1."),
        ("num_layers", 3, "has nothing for model.layers.2."),
        ("ffn_hidden_size", 47, "has shape (48, 32), the model needs (47, 32)"),
        ("polynorm", False, "holds model.layers.0.mlp.act_fn."),
    ],
)
def test_arguments_of_another_model_are_refused(
    name: str, value: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    released(made("polynorm"), tmp_path / "released", **{"polynorm": True, name: value})
    refused(tmp_path, capsys, said)


def test_an_argument_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = released(made("polynorm"), tmp_path / "released", polynorm=True)
    saved = torch.load(file, weights_only=False)
    del saved["args"].norm_epsilon
    torch.save(saved, file)
    refused(tmp_path, capsys, "does not say norm_epsilon")


class Command:
    """Runs when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_nothing_that_the_file_names_is_run(tmp_path: Path) -> None:
    file = released(made("polynorm"), tmp_path / "released", polynorm=True)
    saved = torch.load(file, weights_only=False)
    torch.save({**saved, "optimizer": Command(f"touch {tmp_path / 'ran'}")}, file)
    assert convert(tmp_path) == 0
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)  # the file is as bad as it should be
    assert (tmp_path / "ran").exists()


def test_a_file_cut_short_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = released(made("polynorm"), tmp_path / "released", polynorm=True)
    os.truncate(file, file.stat().st_size - 100)
    refused(tmp_path, capsys, "model_optim_rng.pt")
