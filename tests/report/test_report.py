"""The whole report, through the command line, on run directories of every condition."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from statistics import fmean

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from PIL import Image

from polycom_ext import cli, drawing, reference
from polycom_ext.activations import REGISTRY
from polycom_ext.report import learned, tables
from polycom_ext.report.families import Family, families
from polycom_ext.report.results import Result
from polycom_ext.report.rundir import read

from .conftest import DENSE, MOE, RunMaker, coefficients, curve, metrics


def report(output: Path, *runs: Path) -> int:
    return cli.main(["report", *map(str, runs), "--output", str(output), "--title", "Tiny <models>"])


def test_a_report_of_two_families(
    make_run: RunMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report"
    runs = [
        make_run("d-swiglu", "swiglu", metrics(4.577)),
        make_run("d-polynorm", "polynorm", metrics(4.304), learned=coefficients("polynorm")),
        make_run("m-swiglu", "swiglu", metrics(4.5), options=MOE, ffn_width=192),
        make_run(
            "m-polynorm",
            "polynorm",
            metrics(4.45, labels=("c4_en-validation", "pile-validation"), tasks=("piqa", "sciq")),
            options=MOE,
            ffn_width=192,
            learned=coefficients("polynorm", suffix="mlp.experts"),
        ),
    ]
    assert report(output, *runs) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"Report: {output / 'index.html'}"
    assert said[1].startswith("PolyNorm ended at validation loss 4.30 against SwiGLU's 4.58 after 400 steps")
    assert len(said) == 2

    page = (output / "index.html").read_text()
    assert "<h1>Tiny &lt;models&gt;</h1>" in page
    assert "rehearsal: does not reproduce the paper" in page
    assert said[1].replace("'", "&#39;") in page
    for number in ("4.577", f"{math.exp(curve(400, 4.304)):.1f}", "3.22", "58.68", "2.41", "87.60"):
        assert f">{number}<" in page
    assert "its PPL is not exp(loss)" in page
    assert "upstreams megatron applied" in page
    assert "polycom_ext.integrations.megatron.pretrain" in page

    images = sorted(path.name for path in output.glob("*.png"))
    assert images == [
        "dense-megatron-coefficients.png",
        "dense-megatron-final.png",
        "dense-megatron-loss.png",
        "dense-megatron-perplexity.png",
        "dense-megatron-shapes.png",
        "dense-megatron-time.png",
        "moe-megatron-coefficients.png",
        "moe-megatron-figure-11.png",
        "moe-megatron-figure-3.png",
        "moe-megatron-figure-4.png",
        "moe-megatron-final.png",
        "moe-megatron-loss.png",
        "moe-megatron-perplexity.png",
        "moe-megatron-shapes.png",
        "moe-megatron-time.png",
    ]
    assert all(Image.open(output / name).size[0] == round(drawing.WIDTH * 60) for name in images)
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == len(images)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in page

    with (output / "results.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["d-swiglu", "d-polynorm", "m-swiglu", "m-polynorm"]
    assert float(rows["d-polynorm"]["validation_loss"]) == pytest.approx(curve(400, 4.304))
    assert float(rows["d-polynorm"]["validation_loss_minus_baseline"]) == pytest.approx(-0.273, abs=1e-3)
    assert rows["d-polynorm"]["paper table 1: validation PPL"] == "3.17"
    assert rows["m-polynorm"]["eval/piqa/accuracy_percent"] != ""
    assert rows["m-swiglu"]["eval/piqa/accuracy_percent"] == ""


def test_a_report_of_runs_that_stopped_diverged_or_have_an_order_of_their_own(
    make_run: RunMaker, tmp_path: Path
) -> None:
    diverged = metrics(4.4)
    for step in range(220, 401, 2):
        diverged[step] = dict.fromkeys(diverged[step], math.nan)
    runs = [
        make_run("relu2", "relu2", diverged),
        make_run("short", "polyprelu", metrics(4.4, steps=40), learned=coefficients("polyprelu", step=40)),
        make_run("four", "polyrelu-4", metrics(4.4), learned=coefficients("polyrelu", order=4)),
        make_run("one", "polynorm", metrics(4.4), learned=coefficients("polynorm", layers=1)),
        make_run("two", "polynorm", metrics(4.3)),
        make_run("first", "silu", {1: {"train/loss": math.inf}}),
    ]
    assert report(tmp_path / "report", *runs, runs[0]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "not finite from step 220" in page
    assert "A cross: the loss is not a finite number (ReLU² not finite from step 220, SiLU" in page
    assert ">40 of 400<" in page
    assert "PolyReLU (order 4)" in page
    assert "PolyNorm · two" in page


def test_a_report_of_one_run_that_logged_little(make_run: RunMaker, tmp_path: Path) -> None:
    run = make_run("only", "swiglu", {1: {"train/loss": 7.6}}, options={}, ffn_width=None)
    assert report(tmp_path / "report", run) == 0
    assert [path.name for path in (tmp_path / "report").glob("*.png")] == ["dense-megatron-loss.png"]
    assert "<h2>Dense model, Megatron-LM</h2>" in (tmp_path / "report" / "index.html").read_text()


def test_a_run_that_never_logged_is_said_and_alone_is_status_2(
    make_run: RunMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, silent = make_run("good", "swiglu", metrics(4.5)), make_run("silent", "polynorm")
    assert report(tmp_path / "without", silent) == 2
    error = capsys.readouterr().err
    assert error.startswith("polycom report: run ")
    assert error.count("\n") == 1
    assert "silent never logged a metric" in error
    assert not (tmp_path / "without").exists()
    assert report(tmp_path / "report", good, silent) == 0
    assert "Not shown: 1 of 2 runs." in capsys.readouterr().out
    assert "silent never logged a metric" in (tmp_path / "report" / "index.html").read_text()


def test_a_report_cannot_replace_a_file(
    make_run: RunMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report").write_text("mine")
    assert report(tmp_path / "report", make_run("good", "swiglu", metrics(4.5))) == 2
    assert "it is a file" in capsys.readouterr().err


def result_of(run: Path) -> Result:
    return read(run)


def test_coefficients_are_named_by_power(make_run: RunMaker) -> None:
    layers = [{"name": "decoder.layers.7.mlp", "weight": [0.3, 0.2, 0.1], "bias": [-1.0], "slope": [0.5]}]
    run = make_run(
        "p", "polyprelu", metrics(4.3), learned={"step": 400, "activation": "polyprelu", "layers": layers}
    )
    frame = learned.by_layer(learned.layers(result_of(run)))
    assert frame.index.tolist() == [7]
    assert frame.loc[7].to_dict() == {"a₀": -1.0, "a₁": 0.1, "a₂": 0.2, "a₃": 0.3, "negative slope": 0.5}


def test_coefficients_of_any_activation_are_drawn(make_run: RunMaker, tmp_path: Path) -> None:
    layers = [{"name": f"decoder.layers.{i}.mlp", "alpha_p": [0.1 * i], "alpha_n": [-1.0]} for i in range(3)]
    run = make_run("x", "xielu", metrics(4.3), learned={"step": 400, "activation": "xielu", "layers": layers})
    softplus = torch.nn.functional.softplus(torch.tensor([0.2, -1.0])).tolist()
    expected = {"αₚ": softplus[0], "αₙ": 0.5 + softplus[1]}
    assert learned.by_layer(learned.layers(result_of(run))).loc[2].to_dict() == pytest.approx(expected)
    assert report(tmp_path / "report", run) == 0
    assert "αₚ and αₙ are shown as they enter the formula." in (tmp_path / "report/index.html").read_text()


def test_coefficients_of_another_activation_are_named(make_run: RunMaker, tmp_path: Path) -> None:
    run = make_run("x", "swish", metrics(4.3), learned=coefficients("polynorm"))
    assert report(tmp_path / "report", run) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "does not hold &#39;swish&#39;: it has bias of 1, weight of 3" in page


@pytest.mark.parametrize("activation", ["polyrelu", "polynorm"])
def test_shapes_are_those_of_the_reference(make_run: RunMaker, activation: str) -> None:
    run = make_run("p", activation, metrics(4.3), learned=coefficients(activation))
    result = result_of(run)
    formula = reference.poly_relu if activation == "polyrelu" else reference.poly_norm
    assert result.coefficients is not None
    layer, (_, module) = result.coefficients["layers"][3], learned.layers(result)[3]
    learned_by = tuple(torch.tensor(layer[name], dtype=torch.float64) for name in ("weight", "bias"))
    start = (torch.full((3,), 1 / 3), torch.zeros(1))
    width = 768
    row = torch.special.ndtri((torch.arange(width, dtype=torch.float64) + 0.5) / width)
    for one, coefficients_ in ((learned.start(result), start), (module, learned_by)):
        told = learned.shape(one, result)
        x, y = (torch.tensor(values, dtype=torch.float64) for values in (told.x, told.y))
        if activation == "polyrelu":
            assert (x.min(), x.max(), len(x)) == (-3, 3, 65)
            expected = formula(x, *coefficients_)
        else:  # of the whole row, of which some are kept
            whole = formula(row, *coefficients_)
            expected = whole[torch.isclose(row[:, None], x[None]).any(dim=1)]
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


def names(family: Family) -> list[str]:
    return [result.spec.entry.name for result in family.results]


def test_an_activation_keeps_its_colour_in_every_family(make_run: RunMaker) -> None:
    first = families([result_of(make_run(name, name, metrics(4.3))) for name in ("swiglu", "polynorm")])[0]
    second = families([result_of(make_run("p", "polynorm", metrics(4.3), options={**DENSE, "lr": 1}))])[0]
    assert drawing.looks(names(first))[1] == drawing.looks(names(second))[0]
    assert len({look.color for look in drawing.looks(names(first))}) == 2


def test_smoothing_has_no_lag_and_does_not_hide_what_is_not_finite() -> None:
    line = pd.DataFrame({"1": [2.0 * step for step in range(100)]})
    smoothed, window = drawing.smooth(line)
    assert window == 5
    pd.testing.assert_frame_equal(smoothed[2:98], line[2:98])
    line.loc[50] = math.inf
    gap = drawing.smooth(line)[0]["1"]
    assert math.isnan(gap[50])
    assert gap[51] == pytest.approx((98 + 102 + 104 + 106) / 4)


def test_no_line_to_a_label_crosses_another_label() -> None:
    """Ten curves that end close together, as those of the ablations do."""
    figure = Figure(layout="constrained")
    ax = figure.subplots()
    names = [f"activation {index}" for index in range(10)]
    ax.plot([0, 1], [0, 1])
    ends = [
        (1.0, 0.3 + 0.01 * index, name, look)
        for index, (name, look) in enumerate(zip(names, drawing.looks(["gelu"] * 10), strict=True))
    ]
    drawing.label_ends(figure, ax, ends)
    figure.draw_without_rendering()
    assert len(ax.texts) == len(names)
    for text in ax.texts:
        assert isinstance(text, Annotation)
        assert text.arrow_patch is not None
        column = Text.get_window_extent(text).x0
        line = text.arrow_patch.get_transform().transform_path(text.arrow_patch.get_path())
        assert line.get_extents().x1 <= column + 1


def test_labels_are_moved_apart_as_little_as_needed() -> None:
    assert drawing.spread([0.1, 0.5], 0.1) == [0.1, 0.5]
    assert drawing.spread([0.5, 0.5, 0.9], 0.1) == pytest.approx([0.45, 0.55, 0.9])
    assert drawing.spread([0.99, 1.0], 0.1) == pytest.approx([0.9, 1.0])


def test_the_first_descent_is_cut_from_the_frame() -> None:
    falling = {step: 8.0 if step < 10 else 5 - step / 100 for step in range(101)}
    assert drawing.cut([falling]) == pytest.approx((3.955, 4.945))
    assert drawing.cut([{step: 5.0 - step for step in range(20, 30)}]) is None
    assert drawing.cut([{}, {1: math.nan}]) is None


def test_every_activation_has_a_look_of_its_own(make_run: RunMaker) -> None:
    assert list(drawing._DATA["activations"]) == list(REGISTRY)
    results = [read(make_run(name, name, {1: {"train/loss": 1.0}})) for name in REGISTRY]
    looks = drawing.looks([result.spec.entry.name for result in results])
    assert len({look.color for look in looks}) == len({look.marker for look in looks}) == len(REGISTRY)
    colors = [one for one, _ in (*drawing._DATA["activations"].values(), *drawing._DATA["spare"])]
    markers = [one for _, one in (*drawing._DATA["activations"].values(), *drawing._DATA["spare"])]
    assert len(set(colors)) == len(colors)
    assert len(set(markers)) == len(markers)
    assert {look.dashes for look in looks} == {"-"}


def test_labels_numbers_and_files_of_any_kind(make_run: RunMaker, tmp_path: Path) -> None:
    labels, tasks = ("cost_$5_to_$6", "a^b_c", "x" * 120), ("$", "copa")
    wild = metrics(4.4, labels=labels, tasks=tasks)
    wild[100]["train/loss"] = wild[200]["valid/a^b_c/loss"] = math.inf
    wild[300]["valid/a^b_c/loss"], wild[300]["train/loss"] = -math.inf, 1e308
    never_trained = {50: {"valid/cost_$5_to_$6/loss": 4.0}, 100: {"valid/cost_$5_to_$6/loss": 3.9}}
    learned_badly = coefficients("polynorm")
    learned_badly["layers"][1]["bias"] = [math.inf]
    runs = [
        make_run("a", "polynorm", wild, learned=learned_badly),
        make_run("b" * 120, "polynorm", never_trained),
        make_run("other", "swiglu", {2: {"train/loss": math.inf}, 4: {"train/loss": -math.inf}}),
    ]
    runs[0] = runs[0].rename(tmp_path / "caf\udce9$a$_b")
    (runs[0] / "command.sh").write_bytes(b"#!/bin/sh\nexec caf\xe9\n")
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 1e400, "metrics": {"train/loss": 4}}\n{"step": 398, "metrics": {"train/loss": 1e400}}\n'
        )
    assert report(tmp_path / "report", *runs) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "cost_$5_to_$6" in page
    assert "exec caf\ufffd" in page
    assert "caf\\udce9" in page
    alone = make_run("alone", "gelu", never_trained)
    assert report(tmp_path / "alone", alone) == 0


def test_secrets_stand_nowhere_in_a_report(make_run: RunMaker, tmp_path: Path) -> None:
    secrets = {"WANDB_API_KEY": "0123456789abcdef", "HTTPS_PROXY": "http://me:hunter2@proxy:3128"}
    runs = []
    for name in ("a", "b"):  # which differ in it, so that it would tell them apart in their families' titles
        environment = {**secrets, "WANDB_API_KEY": secrets["WANDB_API_KEY"] + name}
        runs.append(make_run(name, "gelu", metrics(4.4), environment=environment))
        script = "".join(f"    {key}='{value}' \\\n" for key, value in environment.items())
        (runs[-1] / "command.sh").write_text(
            f"#!/bin/sh\nexec env \\\n{script.replace(chr(39), '')}    python\n"
        )
    assert report(tmp_path / "report", *runs) == 0
    for path in (tmp_path / "report").glob("*.[hc]*"):
        assert "0123456789abcdef" not in path.read_text()
        assert "hunter2" not in path.read_text()
    assert "WANDB_API_KEY=${WANDB_API_KEY}" in (tmp_path / "report" / "index.html").read_text()


def test_olmo_runs_show_their_model(make_run: RunMaker, tmp_path: Path) -> None:
    model = {"block_type": "moe", "moe_num_experts": 4, "moe_top_k": 2, "n_layers": 4, "d_model": 192}
    options = {"model": {**model, "n_heads": 4, "max_sequence_length": 128}, "global_train_batch_size": 16}
    for version in ("olmo", "olmo-moe"):
        section = {"trainer": "olmo", "upstream": version, "olmo": options, "megatron": None}
        found = read(make_run(version, "polynorm", metrics(4.4), options={}, **section)).facts
        assert (found.kind, found.experts, found.active_experts) == ("moe", 4, 2)
        assert (found.layers, found.hidden, found.heads) == (4, 192, 4)
        assert (found.sequence, found.batch) == (128, 16)


def test_means_are_of_the_same_tasks(make_run: RunMaker) -> None:
    """The dense paper's table has six tasks, COPA not among them."""
    six = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "sciq", "winogrande")

    def side(*tasks: str) -> tuple[list[str], str, list[float], list[float]]:
        """Titles, note, and of the measured and the published row the values."""
        run = make_run("-".join(tasks), "polynorm", metrics(4.4, tasks=tasks))
        (family,) = families([result_of(run)])
        found = tables.scores(family, "task")
        assert found is not None
        here, paper = (frame.iloc[0].tolist() for of in found.blocks.values() for frame, _ in of.values())
        return found.columns[:-1], found.note, here, paper

    _, note, here, paper = side(*six)
    assert (note, paper[-1]) == ("", 58.68)
    titles, note, more, paper = side(*six, "copa")
    assert (titles[-1], note) == ("COPA", "of the 6 that both have")
    assert (more[-1], paper[-1]) == (pytest.approx(here[-1]), 58.68)
    titles, note, here, paper = side("piqa", "copa", "sciq")
    measured = dict(zip(titles, here, strict=False))
    assert here[-1] == pytest.approx((measured["PIQA"] + measured["SciQ"]) / 2)
    assert paper[-1] == pytest.approx((69.15 + 87.20) / 2)
    assert note == "of the 2 that both have; the paper's table has 6"
    _, _, here, paper = side("copa", "boolq")
    assert here[-1] == pytest.approx(fmean(here[:-1]))
    assert math.isnan(paper[-1])
