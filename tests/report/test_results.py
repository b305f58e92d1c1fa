"""Numbers, families, differences and the sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean

import pytest

from polycom_ext.activations import REGISTRY
from polycom_ext.evaluation import published
from polycom_ext.report.families import Family, families
from polycom_ext.report.rundir import read
from polycom_ext.report.sentence import summarize
from polycom_ext.report.tables import Scores, conditions, differences, scores

from .conftest import DENSE, MOE, RunMaker, curve, metrics


def grouped(*runs: Path) -> list[Family]:
    return families([read(run) for run in runs])


def test_runs_that_differ_only_in_activation_are_one_family_with_the_baseline_first(
    make_run: RunMaker,
) -> None:
    runs = [
        make_run("m-polynorm", "polynorm", metrics(4.4), options=MOE, ffn_width=192, processes_per_node=2),
        make_run("d-polynorm", "polynorm", metrics(4.3)),
        make_run(
            "d-order4", "polyrelu-4", metrics(4.3), options={**DENSE, "tensorboard-dir": "x/d-order4/tb"}
        ),
        make_run("d-swiglu", "swiglu", metrics(4.5), options={**DENSE, "tensorboard-dir": "x/d-swiglu/tb"}),
        make_run("d-gelu", "gelu", metrics(4.5)),
        make_run("d-fast", "gelu", metrics(4.5), options={**DENSE, "lr": 0.01}),
    ]
    found = grouped(*runs)
    assert [(family.title, [group.label for group in family.groups]) for family in found] == [
        ("Dense model, Megatron-LM: megatron.lr 0.01", ["GELU"]),
        (
            "Dense model, Megatron-LM: megatron.lr not set",
            ["SwiGLU", "GELU", "PolyReLU (order 4)", "PolyNorm"],
        ),
        ("Mixture-of-experts model, Megatron-LM", ["PolyNorm"]),
    ]
    assert len({family.slug for family in found}) == 3
    assert found[1].baseline.label == "SwiGLU"
    assert found[2].facts.kind == "moe"


@pytest.mark.parametrize("trainer", ["megatron", "olmo"])
def test_runs_of_several_seeds_are_one_family(trainer: str, make_run: RunMaker) -> None:
    def made(name: str, activation: str, seed: int | None, **options: object) -> Path:
        options = options if seed is None else {"seed": seed, **options}
        section = {"megatron": None, trainer: options}
        return make_run(name, activation, metrics(4.3), options={}, trainer=trainer, **section)

    runs = [made(f"{name}-{seed}", name, seed) for name in ("relu", "gelu") for seed in (1, 2, None)]
    (family,) = grouped(*runs)
    assert [one.facts.seed for one in family.results] == [None, 1, 2] * 2
    assert len(grouped(*runs, made("other", "relu", 1, data_seed=2))) == 2


def test_the_rehearsals_of_a_comparison_are_one_family(make_run: RunMaker) -> None:
    names = ("swiglu", "polynorm")
    runs = [make_run(f"{one}-rehearsal", one, metrics(4.3), rehearsal_of=f"big-{one}") for one in names]
    assert len(grouped(*runs)) == 1


def test_a_title_that_occurs_twice_gets_the_run_s_name(make_run: RunMaker) -> None:
    (family,) = grouped(make_run("one", "polynorm", metrics(4.3)), make_run("two", "polynorm", metrics(4.4)))
    assert [group.label for group in family.groups] == ["PolyNorm · one", "PolyNorm · two"]


def test_runs_that_share_their_name_are_told_apart_by_their_folders(make_run: RunMaker) -> None:
    one, two = (make_run(folder, "polynorm", metrics(loss)) for folder, loss in (("one", 4.3), ("two", 4.4)))
    (two / "run.yaml").write_text((one / "run.yaml").read_text())
    (family,) = grouped(one, two)
    found = {group.label: round(group.final("validation").item(), 2) for group in family.groups}
    assert found == {f"PolyNorm · {one}": 4.3, f"PolyNorm · {two}": 4.4}


def test_orders_stand_in_ascending_order(make_run: RunMaker) -> None:
    (family,) = grouped(make_run("a", "polynorm-4", metrics(4.3)), make_run("b", "polynorm", metrics(4.4)))
    assert [group.label for group in family.groups] == ["PolyNorm", "PolyNorm (order 4)"]


def test_widths_and_parameters_are_matched(make_run: RunMaker) -> None:
    (family,) = grouped(make_run("s", "swiglu", metrics(4.5)), make_run("p", "polynorm", metrics(4.3)))
    swiglu, polynorm = family.results
    assert (swiglu.spec.matched_ffn_width, polynorm.spec.matched_ffn_width) == (512, 768)
    assert swiglu.ffn_parameters == polynorm.ffn_parameters == 4 * 2 * 192 * 768
    (moe,) = grouped(make_run("m", "polynorm", metrics(4.3), options=MOE, ffn_width=192))
    assert moe.results[0].ffn_parameters == 4 * 4 * 2 * 192 * 192
    assert moe.tokens == 400 * 16 * 128


def test_final_losses(make_run: RunMaker) -> None:
    logged = metrics(4.3)
    (family,) = grouped(make_run("p", "polynorm", logged))
    (result,) = family.results
    assert result.numbers["train_loss"] == pytest.approx(
        fmean(logged[step]["train/loss"] for step in range(362, 401, 2))
    )
    assert result.final("validation") == pytest.approx(curve(400, 4.3))
    assert result.final("perplexity") == pytest.approx(math.exp(curve(400, 4.3)))
    assert result.numbers["step_seconds"] == pytest.approx(0.306, abs=0.005)
    assert (result.unfinished, result.progress, result.diverged_at) == (False, "400", None)


def test_the_validation_loss_is_the_mean_over_texts_at_steps_that_have_all(make_run: RunMaker) -> None:
    logged = metrics(4.3, labels=("c4_en-validation", "pile-validation"))
    del logged[400]["valid/pile-validation/loss"]
    (family,) = grouped(make_run("p", "polynorm", logged))
    (result,) = family.results
    assert result.last_evaluation == 350
    assert result.final("validation") == pytest.approx(curve(350, 4.3) + 0.05)


def test_a_text_without_a_label_is_the_validation_text(make_run: RunMaker) -> None:
    (family,) = grouped(make_run("p", "polynorm", {10: {"train/loss": 5.0, "valid/loss": 5.25}}))
    assert family.results[0].curves["text/validation"].to_dict() == {10: 5.25}


def test_differences_are_taken_at_common_steps_only(make_run: RunMaker) -> None:
    (family,) = grouped(
        make_run("s", "swiglu", metrics(4.5)),
        make_run("r", "polyrelu", metrics(4.4, steps=200)),
        make_run("p", "polynorm", metrics(4.3)),
    )
    table = differences(family)
    assert list(table.index) == [50, 100, 150, 200, 250, 300, 350, 400]
    polyrelu = family.groups[1].first
    assert (polyrelu.unfinished, polyrelu.progress) == (True, "200 of 400")
    short = table["PolyReLU", "None"].dropna()
    assert short.to_dict() == pytest.approx({s: curve(s, 4.4) - curve(s, 4.5) for s in (50, 100, 150, 200)})
    assert table["PolyNorm", "None"][400] == pytest.approx(curve(400, 4.3) - curve(400, 4.5))
    assert family.best == "PolyNorm"


def test_an_unfinished_run_is_not_the_best_of_those_that_went_further(make_run: RunMaker) -> None:
    (family,) = grouped(
        make_run("s", "swiglu", metrics(4.5)),
        make_run("g", "gelu", metrics(4.45)),
        make_run("p", "polynorm", metrics(3.0, steps=350)),
    )
    assert family.best == "GELU"


def rows(table: Scores | None, block: int) -> dict[str, list[float | None]]:
    """Label -> the mean over the seeds in each column, of one block of a table."""
    assert table is not None
    means = {label: values.mean() for label, (values, _) in list(table.blocks.values())[block].items()}
    return {label: [None if math.isnan(one) else one for one in of] for label, of in means.items()}


def test_a_mean_needs_all_its_columns(make_run: RunMaker) -> None:
    (family,) = grouped(
        make_run("s", "swiglu", metrics(4.4, tasks=("piqa", "sciq"))),
        make_run("p", "polynorm", metrics(4.4, tasks=("piqa",))),
    )
    measured = rows(scores(family, "task"), 0)
    assert [measured[name][-1] for name in ("SwiGLU", "PolyNorm")] == [pytest.approx(33.7), None]


def test_texts_and_tasks_stand_beside_the_paper_s(make_run: RunMaker) -> None:
    labels, tasks = ("pile-validation", "c4_en-validation", "own"), ("piqa", "hellaswag")
    (family,) = grouped(
        *(
            make_run(name, name, metrics(4.4, labels=labels, tasks=tasks), options=MOE, ffn_width=192)
            for name in ("swiglu", "polynorm", "polynorm-4")
        )
    )
    losses, accuracies = scores(family, "text"), scores(family, "task")
    assert losses is not None
    assert accuracies is not None
    assert losses.columns == ["C4", "Pile", "own", "Mean"]
    mean = curve(400, 4.4) + 0.05  # of C4 and Pile, as the paper's
    assert [row[-1] for row in rows(losses, 0).values()] == pytest.approx([mean] * 3)
    assert rows(losses, 1) == {
        "SwiGLU": [2.72, 2.07, None, pytest.approx((2.72 + 2.07) / 2)],
        "PolyNorm": [2.71, 2.03, None, pytest.approx((2.71 + 2.03) / 2)],
    }
    _, differences = losses.blocks["paper"]["PolyNorm"]
    assert differences.iloc[0, :2].tolist() == pytest.approx([-0.01, -0.04])
    assert accuracies.columns == ["HellaSwag", "PIQA", "Mean"]
    assert rows(accuracies, 0)["SwiGLU"][:2] == pytest.approx([36.2, 31.2])
    assert [row[:2] for row in rows(accuracies, 1).values()] == [[66.49, 76.61], [67.63, 77.04]]
    assert [one.in_paper for one in family.results] == ["swiglu", "polynorm", None]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_published_means_are_those_of_the_published_columns(kind: str) -> None:
    for table in published.load(kind).tables:
        for activation, row in table.rows.items():
            assert fmean(row.values()) == pytest.approx(table.average[activation], abs=0.0075)
            assert activation in REGISTRY
        for column in published.load(kind).headline:
            if "mean" in column.title and column.table == table.number:
                assert column.values == table.average


def test_table_1_is_the_paper_s() -> None:
    loss, perplexity, _ = published.load("dense").headline
    assert list(loss.values) == list(perplexity.values) == ["swiglu", "gelu", "relu", "polyrelu", "polynorm"]
    assert list(loss.values.values()) == [2.19, 2.20, 2.21, 2.17, 2.17]
    assert list(perplexity.values.values()) == [3.22, 3.24, 3.26, 3.18, 3.17]


def test_only_the_paper_s_model_and_tokens_are_no_rehearsal(make_run: RunMaker) -> None:
    options = {
        "num-layers": 24,
        "hidden-size": 2048,
        "num-attention-heads": 16,
        "seq-length": 4096,
        "global-batch-size": 64,
        "train-iters": 953675,
    }
    full = {953675: {"train/loss": 2.17, "valid/validation/loss": 2.2}}
    (family,) = grouped(make_run("p", "polynorm", full, options=options, ffn_width=8256))
    assert not family.rehearsal
    assert summarize([family]) == "PolyNorm reached validation loss 2.20 after 953675 steps."
    short = {953600: full[953675]}
    (family,) = grouped(make_run("q", "polynorm", short, options=options, ffn_width=8256))
    assert family.rehearsal


REHEARSAL = "; a rehearsal that does not reproduce the paper."


def test_the_sentence_names_the_best_and_the_baseline_of_each_kind(make_run: RunMaker) -> None:
    found = grouped(
        make_run("s", "swiglu", metrics(4.577)),
        make_run("g", "gelu", metrics(4.45)),
        make_run("p", "polynorm", metrics(4.304)),
        make_run("ms", "swiglu", metrics(4.5), options=MOE, ffn_width=192),
        make_run("mp", "polynorm", metrics(4.4997), options=MOE, ffn_width=192),
    )
    dense = "PolyNorm ended at validation loss 4.30 against SwiGLU's 4.58 after 400 steps"
    moe = "PolyNorm ended at validation loss 4.4999 against SwiGLU's 4.5002 after 400 steps"
    assert summarize(found[:1]) == dense + REHEARSAL
    assert summarize(found) == f"{dense} in the dense model, and {moe} in the mixture of experts{REHEARSAL}"


def test_the_sentence_says_so_if_the_baseline_is_best(make_run: RunMaker) -> None:
    found = grouped(make_run("s", "swiglu", metrics(4.2)), make_run("p", "polynorm", metrics(4.3)))
    assert summarize(found) == (
        "SwiGLU ended at validation loss 4.20 against PolyNorm's 4.30 after 400 steps" + REHEARSAL
    )


def test_the_sentence_compares_unfinished_runs_at_a_common_step(make_run: RunMaker) -> None:
    found = grouped(make_run("s", "swiglu", metrics(4.5)), make_run("p", "polynorm", metrics(4.3, steps=260)))
    low, high = curve(250, 4.3), curve(250, 4.5)
    assert summarize(found) == (
        f"PolyNorm stood at validation loss {low:.2f} against SwiGLU's {high:.2f} after 250 of 400 steps"
        + REHEARSAL
    )


def test_the_sentence_names_a_run_that_diverged_and_compares_the_others(make_run: RunMaker) -> None:
    diverged = metrics(4.1)
    for step in range(220, 401, 2):
        diverged[step] = dict.fromkeys(diverged[step], math.nan)
    found = grouped(
        make_run("s", "swiglu", metrics(4.5)),
        make_run("r", "polyrelu", diverged),
        make_run("p", "polynorm", metrics(4.3)),
    )
    assert found[0].results[1].diverged_at == 220
    assert summarize(found) == (
        "PolyNorm ended at validation loss 4.30 against SwiGLU's 4.50 after 400 steps; "
        "PolyReLU diverged at step 220" + REHEARSAL
    )


def test_the_sentence_of_a_run_without_validation(make_run: RunMaker) -> None:
    found = grouped(make_run("p", "polynorm", {10: {"train/loss": 5.0}}))
    assert summarize(found) == "PolyNorm reached training loss 5.00 after 10 of 400 steps" + REHEARSAL


def evaluation(run: Path, step: int, scores: dict[str, float], losses: dict[str, float]) -> None:
    """What `polycom eval` leaves of a checkpoint."""
    settings = {"data": "hub", "limit": 20, "num_fewshot": None, "lm_eval": "0.4.13"}
    tasks = {
        name: {"settings": settings, "results": {"results": {name: {f"{METRIC[name]},none": score}}}}
        for name, score in scores.items()
    }
    tokens = {label: {"settings": {}, "loss": loss} for label, loss in losses.items()}
    folder = run / "evaluations" / f"iter_{step}"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"step": step, "tasks": tasks, "tokens": tokens}))


METRIC = {"piqa": "acc_norm", "openbookqa": "acc_norm", "boolq": "acc"}


def test_numbers_of_polycom_eval_stand_beside_those_of_the_training_loop(make_run: RunMaker) -> None:
    logged = metrics(4.4, tasks=("openbook_qa", "piqa"))
    runs = [make_run(name, name, logged, options=MOE, ffn_width=192) for name in ("swiglu", "polynorm")]
    evaluation(runs[1], 200, {"piqa": 0.9}, {})
    evaluation(runs[1], 400, {"piqa": 0.625, "openbookqa": 0.25, "boolq": 0.5}, {"pile-validation": 2.5})
    (family,) = grouped(*runs)
    accuracies, losses = scores(family, "task"), scores(family, "text")
    assert accuracies is not None
    assert list(accuracies.blocks) == ["measured while training", "lm-eval, by polycom eval", "paper"]
    assert accuracies.columns == ["PIQA", "OpenBookQA", "BoolQ", "Mean"]
    trained, measured, paper = (rows(accuracies, block) for block in range(3))
    assert trained["PolyNorm"] == [pytest.approx(36.2), pytest.approx(31.2), None, pytest.approx(33.7)]
    assert measured["SwiGLU"] == [None] * 4
    assert measured["PolyNorm"] == [62.5, 25.0, 50.0, 43.75]  # the mean of the two that the paper has too
    assert paper["PolyNorm"] == [77.04, 40.60, None, pytest.approx((77.04 + 40.60) / 2)]
    assert rows(losses, 1) == {"SwiGLU": [None] * 3, "PolyNorm": [2.5, None, 2.5]}
    said = conditions(family)
    assert said.startswith(
        "lm-eval 0.4.13; data: hub; the first 20 documents of a task only. Metric: acc, but"
    )
