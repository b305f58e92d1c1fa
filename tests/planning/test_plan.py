"""`polycom plan`: what it says of the paper's runs is what one reckons by hand, and what upstream builds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from polycom_ext.cli import main
from polycom_ext.planning.plan import Plan, by_part, plan, total
from polycom_ext.planning.search import changed, smallest
from polycom_ext.runs.adapter import find
from polycom_ext.runs.layout import ACTIVATIONS, of
from polycom_ext.runs.spec import load, load_each

CONFIGS = Path(__file__).parents[2] / "configs"
DENSE, MIXTURE = CONFIGS / "dense-1b" / "table-1.yaml", CONFIGS / "moe-1b-7b" / "megatron.yaml"
RUNS = sorted(
    path for path in CONFIGS.rglob("*.yaml") if "base" not in path.name and path.parent.name != "cpu"
)


def planned(config: Path, *changes: str) -> Plan:
    [spec] = load_each(config, ["activation=polynorm", *changes])
    return plan(spec)


@pytest.mark.parametrize("config", RUNS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_is_planned(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And those of the paper as they are rehearsed; what is tiny already takes a spec long to be read."""
    assert main(["plan", str(config)]) == 0
    shown = capsys.readouterr().out
    assert all(spec.name in shown for spec in load_each(config))
    if config.parent.name == "tiny":
        return
    assert main(["plan", str(config), "--rehearse"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{spec.name}-rehearsal" in shown for spec in load_each(config))


def test_the_dense_run_is_as_by_hand() -> None:
    """docs/planning.md: the numbers stand there with their arithmetic."""
    one = planned(DENSE)
    assert total(one.parameters) == total(one.active) == 1_345_423_456
    assert one.tokens == 953_675 * 64 * 4096
    assert one.flops_per_token == 6 * (1_345_423_360 - 32_000 * 2048 - 49 * 2048 + 24 * 2048 * 4096)
    parameters, tokens = 1_345_423_360, 2 * 4096
    assert by_part(one.memory) == {
        "weights": 2 * parameters + 4 * 96,
        "gradients": 4 * parameters + 4 * 96,
        "optimizer": 12 * parameters // 32 + 8 * 96 // 32,
        "activations": 24 * tokens * (2 * (4 * 2048 + 4) + 10 * 2048 + 4 * 16 + 2 * 2 * 8256 + 12)
        + tokens * (8 + 4 * 2048 + 4 + 4 * 32_000 + 13),
    }
    assert total(one.checkpoint) == 14 * parameters + 12 * 96


def test_the_mixture_is_as_by_hand() -> None:
    one = planned(MIXTURE)
    assert total(one.parameters) == 6_919_100_480
    assert total(one.active) == 1_281_955_904
    experts = 16 * 64 * 2 * 2048 * 1536
    others = total(one.parameters) - experts - 64
    assert by_part(one.memory)["weights"] == 2 * (others + experts // 8) + 4 * 64
    assert by_part(one.memory)["optimizer"] == 12 * (others // 64 + experts // 8 // 8) + 8 * 64 // 64


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_the_page_has_these_numbers(config: Path) -> None:
    page, one = (CONFIGS.parent / "docs" / "planning.md").read_text(), planned(config)
    sums = by_part(one.memory)
    model = [size for part, size in sums.items() if part != ACTIVATIONS]
    for number in (
        total(one.parameters),
        total(one.active),
        *model,
        one.bytes,
        sum(model),
        sums[ACTIVATIONS],
    ):
        assert f"{number:,}" in page


def test_a_rank_of_exact_tensor_parallelism_sends_the_sums_of_its_rows() -> None:
    """24 bytes a row forward and 16 backward, of which a ring of two sends each once."""
    two = ("megatron.tensor-model-parallel-size=2", "megatron.sequence-parallel=true")
    one = planned(DENSE, *two)
    rows = one.layout.micro_batches * 2 * 4096 * 24
    assert by_part(one.traffic)["row sums"] == rows * (24 + 16)
    again = planned(
        DENSE, *two, "megatron.recompute-granularity=selective", "megatron.recompute-modules=[mlp_act]"
    )
    assert by_part(again.traffic)["row sums"] == rows * (2 * 24 + 16)
    assert "row sums" not in by_part(planned(DENSE).traffic)
    assert "row sums" not in by_part(planned(DENSE, *two, "activation=gelu").traffic)


def test_recomputing_the_activation_keeps_one_wide_tensor_instead_of_two() -> None:
    whole = planned(DENSE)
    less = planned(DENSE, "megatron.recompute-granularity=selective", "megatron.recompute-modules=[mlp_act]")
    assert whole.bytes - less.bytes == 24 * 2 * 4096 * (2 * 8256 + 12)
    everything = {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    least = planned(DENSE, *(f"megatron.{name}={value}" for name, value in everything.items()))
    [kept] = [line for line in least.memory if line.title == "input of recomputed layers"]
    assert kept.value == 24 * 2 * 4096 * 2048 * 2
    assert least.bytes < less.bytes


def test_the_first_stage_of_a_pipeline_holds_the_most_micro_batches() -> None:
    deep = planned(DENSE, "megatron.pipeline-model-parallel-size=4")
    wide = [line for line in deep.memory if line.title == "x of the activation"]
    assert deep.stage.title == "pipeline stage 1 of 4"
    assert wide[0].formula.startswith("24 layers in flight")  # 6 layers, and 4 of its 4 micro-batches
    virtual = planned(
        DENSE, *("megatron.pipeline-model-parallel-size=4", "megatron.num-virtual-stages-per-pipeline-rank=2")
    )
    [again] = [line for line in virtual.memory if line.title == "x of the activation"]
    assert again.formula.startswith("24 layers in flight")  # 8 of 8 chunks: 11 would be in flight of more


def test_what_does_not_fit_is_said_with_the_smallest_layout_that_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["plan", str(DENSE), "--set", "activation=polynorm", "--memory", "10"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "does not fit: 21.8 GiB is more than 9 GiB" in shown
    [line] = [line for line in shown.splitlines() if "the smallest layout that fits" in line]
    settings = line.partition(": --set ")[2].split(" --set ")
    spec = load(DENSE, ["activation=polynorm"])
    fitting = plan(changed(find(spec.trainer), spec, settings))
    assert fitting.bytes <= 9 * 2**30
    assert main([*command, *(word for one in settings for word in ("--set", one))]) == 0
    assert "WARNING" not in capsys.readouterr().out


def test_nothing_smaller_than_the_smallest_layout_fits() -> None:
    spec = load(DENSE, ["activation=polynorm"])
    found = smallest(spec, 8 * 2**30)
    assert found is not None
    adapter = find(spec.trainer)
    earlier = itertools.takewhile(
        lambda changes: changes != found.changes, of(adapter, spec).alternatives(spec)
    )
    assert all(plan(changed(adapter, spec, changes)).bytes > 8 * 2**30 for changes in earlier)
    assert smallest(spec, 2**20) is None


def test_experts_stay_on_as_many_ranks_as_they_were_given() -> None:
    [spec] = load_each(MIXTURE, ["activation=polynorm"])
    found = smallest(spec, 30 * 2**30)
    assert found is not None
    assert not any("expert" in change for change in found.changes)


def test_it_scales_to_1024_gpus_at_one_global_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(DENSE), "--set", "activation=polynorm", "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)
    rows = {row["gpus"]: row for row in told["scaling"]}
    assert sorted(rows) == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert rows[8]["micro_batches"] == 4
    assert rows[32]["set"] == []
    assert rows[1024]["set"]
    assert told["parameters"] == 1_345_423_456
    assert told["memory"]["total"] == sum(term["value"] for term in told["terms"]["memory"])


def test_the_arithmetic_is_shown_and_its_sum_is_the_sum(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(DENSE), "--set", "activation=polynorm", "--explain"]) == 0
    shown = capsys.readouterr().out
    assert "= 24 layers · 2 matrices · 2,048 hidden · 8,256 width" in shown
    one = planned(DENSE)
    for line in (*one.parameters, *one.memory, *one.checkpoint):
        assert evaluated(line.formula) == pytest.approx(line.value, rel=1e-6)


def evaluated(formula: str) -> float:
    """A line of --explain, by what stands in it."""
    value: float = 1
    for factor in formula.replace(" / ", " · /").split(" · "):
        number = int(factor.strip("/").split()[0].replace(",", ""))
        value = value / number if factor.startswith("/") else value * number
    return value


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "H9000"], "--device 'H9000': its peak is not known here"),
        (
            ["--set", "megatron.multi-latent-attention=true"],
            "does not reckon megatron.multi-latent-attention",
        ),
        (["--set", "megatron.micro-batch-size=null"], "a plan needs megatron.micro-batch-size"),
        (["--set", "megatron.tokenizer-type=HuggingFaceTokenizer"], "megatron.padded-vocab-size=N"),
        (["--set", "megatron.tensor-model-parallel-size=3"], "tensor"),
        (["--set", "megatron.optimizer=sgd"], "only adam"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(DENSE), *arguments]) == 2
    refused = capsys.readouterr()
    assert said in refused.err
    assert refused.err.count("\n") == 1
    assert not refused.out


@pytest.mark.parametrize("given", ["0", "nan", "1.5", "x"])
def test_a_share_is_above_0_and_at_most_1(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(DENSE), "--mfu", given])
    assert "--mfu" in capsys.readouterr().err


def test_a_trainer_that_does_not_lay_out_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from polycom_ext import trainers
    from polycom_ext.errors import PolycomError

    class Silent:
        """Keeps the contract, but for what is optional."""

        section = "megatron"
        upstreams: ClassVar[dict[str, Any]] = {}

    spec = load(DENSE, ["activation=polynorm"])
    monkeypatch.setattr(trainers, "find", lambda name: Silent())
    with pytest.raises(PolycomError, match="does not say how it lays a run out"):
        plan(spec)
