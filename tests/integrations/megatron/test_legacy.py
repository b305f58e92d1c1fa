"""Checkpoints of --ckpt-format torch, a file a rank: read and written without Megatron, nothing run."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from polycom_ext import cli
from polycom_ext.checkpoints.forms import Options, Ranks
from polycom_ext.checkpoints.model import Model, checked
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron import architecture
from polycom_ext.integrations.megatron.conversion import BY_RANK, CHECKPOINTS
from polycom_ext.integrations.megatron.table import AROUND, BLOCKS, block_rows

from .conftest import Trainer
from .test_conversion import options, trained
from .test_from_converted import EP2, PP2, STEPS, STRICTNESS, TP2
from .test_written import KINDS, made

LAYOUTS: dict[str, tuple[int, list[str], str]] = {
    "gated, TP2": (2, TP2, "gated"),
    "experts, EP2": (2, EP2, "experts"),
    "grouped queries, TP2, PP2": (4, [*TP2, *PP2], "grouped queries, tied"),
    "VPP": (2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"], "four layers"),
    "biases, TP2": (2, TP2, "biases"),
}
IN_FULL = ("gated, TP2", "experts, EP2")


def opened(path: Path) -> Model:
    found = CHECKPOINTS.find(path)
    assert found is not None
    return checked(CHECKPOINTS.read(found.path))


@pytest.mark.full
@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one in IN_FULL else pytest.mark.long) for one in LAYOUTS]
)
def test_parts_are_the_whole_that_torch_dist_holds(train: Trainer, name: str, tmp_path: Path) -> None:
    processes, layout, model = LAYOUTS[name]
    found = {}
    for form in ("torch", "torch_dist"):
        trained(train, model, tmp_path / form, layout, processes, form)
        found[form] = opened(tmp_path / form)
    assert found["torch"].config == found["torch_dist"].config
    for tensor, read in found["torch_dist"].tensors.items():
        assert torch.equal(found["torch"].tensors[tensor](), read()), tensor


def saved(model: Model, folder: Path, /, **changed: Any) -> Path:
    """As one rank saves it."""
    tensors = {row.theirs: row.write(model.tensors, model.config) for row in AROUND[:2]}
    tensors["output_layer.weight"] = model.tensors["lm_head.weight"]()
    for layer in range(model.config["num_hidden_layers"]):
        for row in block_rows(model.config, written=True):
            ours = [f"model.layers.{layer}.{name}" for name in row.ours]
            if ours[0] in model.tensors:
                whole = tuple(model.tensors[name]() for name in ours)
                tensors[f"{BLOCKS}{layer}.{row.theirs}"] = row.layout.join(whole, model.config)
    state = {"args": architecture.arguments(model.config), "model": tensors, "iteration": 3, **changed}
    path = folder / "iter_0000003" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    return path


def test_a_file_of_one_rank_is_a_model(tmp_path: Path) -> None:
    model = made("gated with biases")
    saved(model, tmp_path)
    again = opened(tmp_path)
    assert again.config == model.config
    for name, read in model.tensors.items():
        assert torch.equal(again.tensors[name](), read()), name


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_nothing_that_a_file_names_is_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = saved(made("polynorm"), tmp_path / "run", rng_state=[Malicious(f"touch {canary}")])
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "megatron"]) == 0
    assert not canary.exists()
    torch.load(path, weights_only=False)  # the file is as bad as it should be
    assert canary.exists()


def arguments(**changed: Any) -> Namespace:
    return Namespace(**{**vars(architecture.arguments(made("polynorm").config)), **changed})


def without(name: str) -> Namespace:
    args = arguments()
    delattr(args, name)
    return args


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"args": None}, "holds no arguments"),
        ({"model": {}}, "holds no embedding.word_embeddings.weight"),
        ({"model": None}, "holds no model"),
        ({"args": without("rotary_base")}, "do not say rotary_base"),
        ({"args": arguments(tensor_model_parallel_size=2)}, "mp_rank_01/model_optim_rng.pt is missing"),
        ({"args": arguments(padded_vocab_size=100)}, "96 embeddings, and its arguments say padded_vocab"),
    ],
)
def test_what_is_no_whole_model_is_refused(
    changed: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(made("polynorm"), tmp_path, **changed)
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "out"), "--to", "megatron"]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = saved(made("polynorm"), tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PolycomError, match=r"no checkpoint is whole: .*model_optim_rng\.pt without its end"):
        CHECKPOINTS.find(tmp_path)


def written(model: Model, folder: Path, ranks: Ranks) -> Path:
    folder.mkdir()
    BY_RANK.write(model, folder, Options(ranks=ranks), lambda size: None)
    return folder


SHARED_BY = (Ranks(), Ranks(tensor=2), Ranks(tensor=2, pipeline=3), Ranks(expert=2), Ranks(2, 3, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_for_ranks_is_read_as_it_was(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    for number, ranks in enumerate(SHARED_BY):
        if ranks.expert > 1 and not model.config["num_experts"]:
            continue
        again = opened(written(model, tmp_path / f"{number}", ranks))
        assert again.config == model.config
        for name, read in model.tensors.items():
            assert torch.equal(again.tensors[name](), read()), name
        files = list((tmp_path / f"{number}" / "release").glob("*/model_optim_rng.pt"))
        assert len(files) == ranks.tensor * ranks.pipeline * ranks.expert
        assert sorted(path.name for path in (tmp_path / f"{number}").iterdir()) == [
            "latest_checkpointed_iteration.txt",
            "release",
        ]


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ("--tensor-parallel 3", "has num_attention_heads 4, which 3 ranks of tensor"),
        ("--pipeline-parallel 2", "has num_hidden_layers 3, which 2 ranks of pipeline parallelism"),
        ("--expert-parallel 2", "has num_experts 0"),
    ],
)
def test_ranks_that_cannot_share_a_model_are_refused(
    ranks: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(made("polynorm"), tmp_path / "source", Ranks())
    command = ["convert", str(source), str(tmp_path / "out"), "--to", "megatron-torch", *ranks.split()]
    assert cli.main(command) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_ranks_for_a_form_that_has_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(made("polynorm"), tmp_path / "source", Ranks())
    command = ["convert", str(source), str(tmp_path / "out"), "--to", "megatron", "--tensor-parallel", "2"]
    assert cli.main(command) == 2
    assert "--to megatron is read in any layout of ranks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


ONTO: dict[str, tuple[list[str], list[str], str]] = {
    "one process": ([], [], "polynorm"),
    "TP2, PP2": (["--tensor-parallel=2", "--pipeline-parallel=2"], [*TP2, *PP2], "grouped queries, tied"),
    "EP2": (["--expert-parallel=2"], EP2, "experts"),
    "gated, TP2": (["--tensor-parallel=2"], TP2, "gated"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one == "one process" else pytest.mark.long) for one in ONTO]
)
def test_megatron_trains_on_from_what_is_written_as_from_what_it_was(
    train: Trainer, name: str, tmp_path: Path
) -> None:
    """Upstream says nothing of a name that it misses in such a file; the losses do."""
    ranks, layout, model = ONTO[name]
    trained(train, model, tmp_path / "trained")
    source, target = str(tmp_path / "trained"), str(tmp_path / "onward")
    assert cli.main(["convert", source, target, "--to", "megatron-torch", *ranks]) == 0
    straight, onward = (
        train.exactly(*options(model), "--load", *more, processes=processes, iterations=STEPS)
        for processes, more in (
            (1, [source, "--finetune", *STRICTNESS]),
            (2 ** len(ranks), [target, "--ckpt-format", "torch", *layout]),
        )
    )
    expected = straight.series("train/loss")
    assert onward.series("train/loss") == (pytest.approx(expected, rel=1e-6) if layout else expected)
