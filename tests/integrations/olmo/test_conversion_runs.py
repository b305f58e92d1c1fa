"""Checkpoints of OLMo's own training, in each format it saves: converted as they are, and trained on."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from polycom_ext import cli
from polycom_ext.checkpoints.model import Model
from polycom_ext.integrations.olmo.conversion import CHECKPOINTS, STEP

from .conftest import Run, Trainer
from .test_conversion import convert, logits, olmos, saved, transformers

FULL, LONG = pytest.mark.full, pytest.mark.long
EXPERTS: dict[str, Any] = {"moe": True, "model": {"activation_type": "polynorm"}}
DENSE: dict[str, Any] = {"model": {"activation_type": "polynorm"}}
HYBRID = {"sharding_strategy": "HYBRID_SHARD", "hybrid_sharding_num_model_replicas": 2}
BOTH: dict[str, Any] = {"save_interval": 2, "save_interval_unsharded": 2, "save_num_checkpoints_to_keep": -1}
DDP = {"distributed_strategy": "ddp", "ddp": {"grad_sync_mode": "batch"}, "save_interval": None}
RUNS: dict[str, dict[str, Any]] = {
    "experts, FSDP": {"processes": 2, **EXPERTS},
    "dense, FSDP": {"processes": 2, **DENSE},
    "one process": DENSE,
    "hybrid": {"processes": 4, "fsdp": HYBRID, **DENSE},
    "olmo_core": {"processes": 2, "sharded_checkpointer": "olmo_core", **EXPERTS},
    "SwiGLU, FSDP": {"processes": 2, "moe": True, "model": {"activation_type": "swiglu"}},
    "DDP": {"processes": 2, **DDP, **DENSE},
}
IN_TEST = "experts, FSDP"
MARKS: dict[str, Any] = {**dict.fromkeys(RUNS, LONG), "olmo_core": FULL, IN_TEST: ()}


@pytest.fixture(scope="module")
def trained(train: Trainer) -> Callable[[str], Run]:
    """A run of four steps that saved at two and at four, sharded where it could, and unsharded."""
    return cache(lambda name: train(max_duration=4, **{**BOTH, **RUNS[name]}))


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS[name]) for name in RUNS])
def test_logits_of_a_run_are_olmos_and_its_tokenizer_goes_along(
    trained: Callable[[str], Run],
    inputs: dict[str, Any],
    olmo: None,
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "olmo_core":
        pytest.importorskip("olmo_core", reason="needs ai2-olmo-core==0.1.0")
    run, tokenizer = trained(name), Path(inputs["tokenizer"]["identifier"])
    theirs = olmos(run.folder / "checkpoints" / "step4-unsharded")
    model = transformers(convert(run.folder, tmp_path / "hf", "hf"))
    chosen = "step4-unsharded" if name == "DDP" else "step4"
    assert f" of {run.folder / 'checkpoints' / chosen}\n" in capsys.readouterr().out
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    back = convert(convert(run.folder, tmp_path / "olmo", "olmo"), tmp_path / "again", "hf")
    assert (back / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_torchs_new_sharded_format_is_read(trained: Callable[[str], Run], olmo: None, tmp_path: Path) -> None:
    """OLMo saves it with any torch, and loads it with an old one only."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    unsharded = trained(IN_TEST).folder / "checkpoints" / "step4-unsharded"
    state = {"model": torch.load(unsharded / "model.pt"), "optim": {"state": {}}}
    save(state, storage_writer=FileSystemWriter(tmp_path / "step4" / "model_and_optim"), no_dist=True)
    shutil.copy(unsharded / "config.yaml", tmp_path / "step4")
    same(CHECKPOINTS.read(tmp_path / "step4"), CHECKPOINTS.read(unsharded))


def test_safetensors_of_upstreams_script_are_read(
    trained: Callable[[str], Run], olmo: None, tmp_path: Path
) -> None:
    from olmo.safetensors_util import state_dict_to_safetensors_file

    unsharded = trained(IN_TEST).folder / "checkpoints" / "step4-unsharded"
    state_dict_to_safetensors_file(torch.load(unsharded / "model.pt"), tmp_path / "model.safetensors")
    shutil.copy(unsharded / "config.yaml", tmp_path)
    same(CHECKPOINTS.read(tmp_path), CHECKPOINTS.read(unsharded))


def same(one: Model, other: Model) -> None:
    assert one.config == other.config
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(read(), other.tensors[name]()) for name, read in one.tensors.items())


@pytest.fixture
def copied(trained: Callable[[str], Run], tmp_path: Path) -> Path:
    """A copy of a run, to be spoilt; its checkpoints."""
    return shutil.copytree(trained(IN_TEST).folder, tmp_path / "run") / "checkpoints"


def test_damaged_checkpoints_of_a_run_are_passed_over(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "step4" / "rank1.pt").unlink()
    (copied / "step4-unsharded" / "optim.pt").unlink()  # nothing that is converted
    convert(copied.parent, tmp_path / "one", "hf")
    printed = capsys.readouterr()
    assert f" of {copied / 'step4-unsharded'}\n" in printed.out
    assert f"{copied / 'step4'} lacks rank1.pt" in printed.err
    model = copied / "step4-unsharded" / "model.pt"
    model.write_bytes(model.read_bytes()[:-100])
    convert(copied.parent, tmp_path / "two", "hf")
    assert f" of {copied / 'step2'}\n" in capsys.readouterr().out
    for config in copied.glob("step*/config.yaml"):
        config.unlink()
    assert cli.main(["convert", str(copied.parent), str(tmp_path / "three"), "--to", "hf"]) == 2
    assert "lacks config.yaml" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()


def test_folders_of_another_form_are_not_taken_for_damaged_ones(copied: Path, tmp_path: Path) -> None:
    """As a training of transformers' leaves them."""
    folder = convert(copied.parent, tmp_path / "hf", "hf")
    shutil.copytree(folder, folder / "step100")
    convert(folder, tmp_path / "again", "hf")


class Command:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def test_nothing_that_a_rank_has_pickled_is_run(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "optim": Command(), "world_size": 2}, copied / "step4" / "rank1.pt")
    assert cli.main(["convert", str(copied / "step4"), str(tmp_path / "hf"), "--to", "hf"]) == 2
    assert not Path("ran").exists()
    torch.load(copied / "step4" / "rank1.pt", weights_only=False)  # the file is as bad as it should be
    assert Path("ran").exists()


RESET: dict[str, Any] = {"reset_optimizer_state": True, "reset_trainer_state": True}


@pytest.mark.parametrize(
    "name",
    [pytest.param(IN_TEST, marks=FULL), *(pytest.param(name, marks=LONG) for name in ("one process", "DDP"))],
)
def test_training_goes_on_from_what_was_converted(
    train: Trainer, trained: Callable[[str], Run], name: str, tmp_path: Path
) -> None:
    first = trained(name)
    folder = convert(convert(first.folder, tmp_path / "hf", "hf"), tmp_path / "olmo", "olmo")
    own = first.folder / "checkpoints" / "step4-unsharded"
    losses = [
        train(max_duration=4, load_path=str(path), **{**BOTH, **RESET, **RUNS[name]}).series("train/loss")
        for path in (folder, own)
    ]
    assert losses[0] == losses[1], "as from the checkpoint that it was"
    assert losses[0][1] < first.series("train/loss")[1] - 0.1, "not from scratch"
    assert losses[0][4] < losses[0][1]


@LONG
def test_a_relu_model_trains_on_as_a_polyrelu_model(train: Trainer, olmo: None, tmp_path: Path) -> None:
    source = saved(tmp_path / "step2-unsharded", activation_type="relu", init_std=0.02)
    relu, upgraded = convert(source, tmp_path / "relu", "olmo"), tmp_path / "polyrelu"
    command = ["convert", str(source), str(upgraded), "--to", "olmo", "--activation", "polyrelu"]
    assert cli.main(command) == 0
    before, after = (
        train(max_duration=4, load_path=str(folder), model={"activation_type": name}, **RESET)
        for folder, name in ((relu, "relu"), (upgraded / STEP, "polyrelu"))
    )
    losses = after.series("train/loss")
    assert losses[1] == pytest.approx(before.series("train/loss")[1], rel=1e-6)
    assert losses[4] < losses[1]
    assert after.coefficients["layers"][0]["weight"] != [0.0, 0.0, 1.0]


def test_an_analysis_of_a_run_has_the_coefficients_of_each_checkpoint(
    trained: Callable[[str], Run], tmp_path: Path
) -> None:
    run = trained(IN_TEST)
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "run.yaml").write_text("trainer: olmo\nactivation: polynorm\n")
    assert cli.main(["analyze", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "coefficients-over-training.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for step in ("2", "4"):
        state = torch.load(run.folder / "checkpoints" / f"step{step}-unsharded" / "model.pt")
        found = [row for row in rows if (row["step"], row["layer"]) == (step, "1")]
        values = {row["coefficient"]: float(row["value"]) for row in found}
        expected = state["transformer.blocks.1.act.weight"].double().tolist()
        assert [values[name] for name in ("a₃", "a₂", "a₁")] == expected
