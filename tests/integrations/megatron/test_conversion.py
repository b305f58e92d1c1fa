"""Checkpoints of Megatron's as models apart from it: the same logits, whatever the layout that saved them."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM

from polycom_ext import activations, cli
from polycom_ext.checkpoints import inert
from polycom_ext.integrations import huggingface
from polycom_ext.integrations.megatron import architecture
from polycom_ext.integrations.megatron.native import FLAGS

from .conftest import BIASES, CPU_OPTIONS, TINY, Trainer
from .test_layouts import MOE_MODEL

huggingface.register()
TOKENS = torch.randint(0, 127, (2, 32), generator=torch.Generator().manual_seed(3))
GATED = ["--ffn-hidden-size", "32"]
MODELS: dict[str, list[str]] = {
    "polynorm": ["--polycom-activation", "polynorm"],
    "experts": [*MOE_MODEL, "--polycom-activation", "polynorm"],
    "experts, softmax first": [*MOE_MODEL, "--polycom-activation", "polyrelu", "--moe-router-pre-softmax"],
    "gated experts": [*MOE_MODEL, "--swiglu"],
    "grouped queries, tied": [
        *("--polycom-activation", "polyrelu-2", "--group-query-attention", "--num-query-groups", "2"),
        *("--no-untie-embeddings-and-output-weights", "--rotary-base", "5000", "--norm-epsilon", "1e-3"),
    ],
    "normalised queries": ["--polycom-activation", "polynorm", "--qk-layernorm"],
    "layer norm": ["--polycom-activation", "polynorm", "--normalization", "LayerNorm"],
    "biases": ["--polycom-activation", "polynorm", BIASES],
    "gated": [*GATED, "--swiglu"],
    "four layers": ["--polycom-activation", "polynorm", "--num-layers", "4"],
}
LAYOUTS: dict[str, tuple[int, list[str], str]] = {
    "TP2, PP2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2".split(), "polynorm"),
    "gated, TP2": (2, "--tensor-model-parallel-size 2".split(), "gated"),
    "EP2, distributed optimizer": (
        *(2, "--expert-model-parallel-size 2 --use-distributed-optimizer".split()),
        "experts",
    ),
    "ETP2": (
        2,
        "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 2 --sequence-parallel".split(),
        "experts",
    ),
}


def options(model: str) -> list[str]:
    """Megatron's, without those that a model takes away."""
    taken = [*CPU_OPTIONS, *TINY, *MODELS.get(model, ["--polycom-activation", model])]
    for away, instead in (
        ("--untie-embeddings-and-output-weights", "--no-untie-embeddings-and-output-weights"),
        ("--disable-bias-linear", BIASES),
    ):
        if instead in taken:
            taken = [option for option in taken if option not in (away, instead)]
    return taken


def trained(
    train: Trainer,
    model: str,
    folder: Path,
    layout: list[str] | None = None,
    processes: int = 1,
    form: str = "torch_dist",
) -> Path:
    """A checkpoint after two steps."""
    saving = ["--save", str(folder), "--save-interval", "2", "--ckpt-format", form]
    run = train.exactly(*options(model), *(layout or []), *saving, processes=processes, iterations=2)
    assert not any(run.statuses), run.log[-3000:]
    return folder / "iter_0000002"


def converted(checkpoint: Path, folder: Path) -> Any:
    """The model that transformers makes of it."""
    assert cli.main(["convert", str(checkpoint), str(folder), "--to", "hf", "--shard-bytes", "20000"]) == 0
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


def agree(train: Trainer, model: str, checkpoint: Path, folder: Path) -> None:
    ours = converted(checkpoint, folder)
    theirs = train.script("logits.py", str(checkpoint.parent), json.dumps(TOKENS.tolist()), *options(model))
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS).logits, torch.tensor(theirs), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def checkpoint(train: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One to be read, and to be spoilt in copies."""
    return trained(train, "polynorm", tmp_path_factory.mktemp("checkpoint"))


def test_logits_are_megatrons(train: Trainer, checkpoint: Path, tmp_path: Path) -> None:
    agree(train, "polynorm", checkpoint, tmp_path / "hf")


def test_logits_of_experts_are_megatrons(train: Trainer, tmp_path: Path) -> None:
    agree(train, "experts", trained(train, "experts", tmp_path / "megatron"), tmp_path / "hf")


OTHERS = sorted(
    [*MODELS.keys() - {"polynorm", "experts"}, *activations.REGISTRY.keys() - {*FLAGS, "polynorm"}]
)
IN_FULL = ("gated", "gated experts", "experts, softmax first", "normalised queries")
"""Those with a table row or a rule of their own; the rest takes minutes."""


@pytest.mark.full
@pytest.mark.parametrize(
    "model", [pytest.param(one, marks=() if one in IN_FULL else pytest.mark.long) for one in OTHERS]
)
def test_logits_are_megatrons_for_every_model(train: Trainer, model: str, tmp_path: Path) -> None:
    agree(train, model, trained(train, model, tmp_path / "megatron"), tmp_path / "hf")


@pytest.mark.full
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_makes_no_difference(train: Trainer, name: str, tmp_path: Path) -> None:
    processes, layout, model = LAYOUTS[name]
    checkpoint = trained(train, model, tmp_path / "megatron", layout, processes)
    agree(train, model, checkpoint, tmp_path / "hf")


@pytest.mark.parametrize("name", architecture.PLAIN)
def test_what_the_format_lacks_is_refused(
    checkpoint: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert getattr(arguments(checkpoint), name, architecture.PLAIN[name][0]) in architecture.PLAIN[name]
    changed(checkpoint, tmp_path / "copy", name, "something else")
    refused(tmp_path, capsys, f"{name} something else")


@pytest.mark.parametrize("damage", ["a shard cut short", "a shard missing", "no arguments", "no metadata"])
def test_a_damaged_checkpoint_is_refused(
    checkpoint: Path, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    shard = copy / "__0_0.distcp"
    if damage == "a shard cut short":
        shard.write_bytes(shard.read_bytes()[:-1])
        refused(tmp_path, capsys, "holds __0_0.distcp of")
    elif damage == "a shard missing":
        shard.unlink()
        refused(tmp_path, capsys, "lacks __0_0.distcp")
    elif damage == "no arguments":
        torch.save({}, copy / "common.pt")
        refused(tmp_path, capsys, "holds no arguments")
    else:
        (copy / ".metadata").write_bytes(b"")
        refused(tmp_path, capsys, "holds .metadata, which cannot be read")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num_layers", 3, "has nothing for model.layers.2"),
        ("num_layers", 1, "holds model.layers.1"),
        ("kv_channels", 4, "have 96 rows, and 4 groups of 1 + 2 heads of 4 need 48"),
        ("polycom_activation", "prelu", "the exchange format has no place"),
        ("polycom_activation", "polynone", "unknown activation 'polynone'"),
    ],
)
def test_arguments_of_another_model_are_refused(
    checkpoint: Path, name: str, value: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(checkpoint, tmp_path / "copy", name, value)
    refused(tmp_path, capsys, said)


def arguments(checkpoint: Path) -> Namespace:
    """Those that were saved, but for objects of Megatron's."""
    args = vars(inert.load(checkpoint / "common.pt")["args"])
    return Namespace(
        **{name: value for name, value in args.items() if not isinstance(value, inert.Named | type)}
    )


def changed(checkpoint: Path, copy: Path, name: str, value: Any) -> None:
    """A copy whose arguments say something else."""
    shutil.copytree(checkpoint, copy)
    args = arguments(checkpoint)
    setattr(args, name, value)
    torch.save({"args": args}, copy / "common.pt")


def refused(folder: Path, capsys: pytest.CaptureFixture[str], said: str) -> None:
    """Exit status 2, one sentence, and nothing that looks finished."""
    assert cli.main(["convert", str(folder / "copy"), str(folder / "hf"), "--to", "hf"]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in printed
    assert not (folder / "hf").exists()


def test_a_folder_that_exists_is_not_written_over(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hf").mkdir()
    assert cli.main(["convert", str(checkpoint), str(tmp_path / "hf"), "--to", "hf"]) == 2
    assert "nothing is written over" in capsys.readouterr().err
    assert list((tmp_path / "hf").iterdir()) == []
