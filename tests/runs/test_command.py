"""`polycom run`: what it writes, what it refuses before it starts, and when there is nothing to do."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from polycom_ext import __version__, upstream
from polycom_ext.cli import main
from polycom_ext.runs.adapter import Upstream
from polycom_ext.runs.rendering import Command, render
from polycom_ext.runs.spec import load

from .third_party.toy import ToyAdapter

RUN = Path("outputs/small")


@pytest.fixture
def finished(toy_spec: Callable[..., str], finished_directory: Path) -> str:
    """The spec of a finished run of two steps, whose directory lies where it belongs."""
    shutil.copytree(finished_directory, RUN)
    return toy_spec(steps=2)


def test_a_run_leaves_its_spec_command_versions_and_log(finished: str) -> None:
    assert load(RUN / "run.yaml") == load(Path(finished))
    assert sorted(path.name for path in RUN.iterdir()) == sorted(
        "checkpoints coefficients.json command.sh job.json log.txt metrics.jsonl pid-0 run.yaml site.yaml "
        "versions.json".split()
    )
    assert json.loads((RUN / "coefficients.json").read_text())["step"] == 2
    versions = json.loads((RUN / "versions.json").read_text())
    assert versions["polycom-ext"] == __version__
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == torch.__version__
    assert versions["upstreams"] == {}
    [attempt] = versions["attempts"]
    assert attempt["status"] == 0
    assert attempt["from_step"] is None
    assert attempt["started"] <= attempt["ended"]


def test_a_dry_run_prints_the_command_that_a_run_saves_and_writes_nothing(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    spec = toy_spec(steps=2, needs="not-there")
    assert main(["run", spec, "--dry-run"]) == 0
    printed = capfd.readouterr().out
    assert [path.name for path in Path.cwd().iterdir()] == [spec]
    Path("not-there").touch()
    assert main(["run", spec]) == 0
    assert (RUN / "command.sh").read_text() == printed


def test_a_file_of_the_adapters_own_is_shown_by_a_dry_run_and_written_before_a_start(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    spec = toy_spec(steps=1, note="first\n\nlast\n")
    assert main(["run", spec, "--dry-run"]) == 0
    script, _, shown = capfd.readouterr().out.partition(f"\n# {RUN.absolute()}")
    assert not RUN.exists()
    assert shown == "/toy.txt:\n#   first\n#\n#   last\n"
    assert main(["run", spec]) == 0
    assert (RUN / "toy.txt").read_text() == "first\n\nlast\n"
    assert (RUN / "command.sh").read_text() == script


def test_the_saved_command_is_the_run(finished_directory: Path) -> None:
    metrics = finished_directory / "metrics.jsonl"
    logged = metrics.read_text()
    metrics.unlink()
    (finished_directory / "checkpoints" / "step").unlink()
    environment = {"PATH": os.environ["PATH"]}
    subprocess.run(
        [finished_directory / "command.sh"], cwd="/", env=environment, check=True, capture_output=True
    )
    assert metrics.read_text() == logged


def test_no_variable_of_a_spec_hides_the_trees_or_breaks_the_script(
    toy_spec: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyAdapter, "upstreams", {"toy": Upstream("Toy", ("megatron", "olmo"))})
    monkeypatch.setenv("PYTHONPATH", f"/inherited:{upstream.tree('olmo')}::/spec")
    path = Path(toy_spec(steps=1))
    text = yaml.safe_load(path.read_text())
    odd = "two\nlines '$HOME' \"`ls`\" \\\\ ü"
    text["environment"] = {"PYTHONPATH": "/spec:/more:", "ODD": odd}
    path.write_text(yaml.safe_dump(text))
    command = render(load(path), ToyAdapter(), Path("/run"))
    trees = [str(upstream.tree(name)) for name in ("megatron", "olmo")]
    assert command.environment["PYTHONPATH"].split(":") == [*trees, "/spec", "/more", "/inherited"]
    script = Command(["printenv", "ODD"], command.environment, Path("/")).script()
    printed = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert printed.stdout == f"{odd}\n"


def test_a_complete_run_is_left_alone_and_says_so(finished: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in RUN.rglob("*")}
    assert main(["run", finished]) == 0
    assert "already complete at step 2, nothing to do" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in RUN.rglob("*")} == before


def test_a_run_that_saved_its_last_step_but_failed_after_it_is_not_complete(
    finished: str,
) -> None:
    versions = json.loads((RUN / "versions.json").read_text())
    versions["attempts"][0]["status"] = 1
    (RUN / "versions.json").write_text(json.dumps(versions))
    assert main(["run", finished]) == 0
    assert len(json.loads((RUN / "versions.json").read_text())["attempts"]) == 2


def test_another_model_over_existing_checkpoints_is_refused_by_the_keys_that_differ(
    finished: str, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = (RUN / "run.yaml").read_text()
    changes = ["--set", "activation=gelu", "--set", "toy.size=2", "--set", "toy.steps=3"]
    assert main(["run", finished, *changes]) == 2
    assert "another model (it differs in activation, toy.size)" in capfd.readouterr().err
    assert (RUN / "run.yaml").read_text() == saved


def test_a_longer_run_of_the_same_model_goes_on_where_it_was(
    finished: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", finished, "--set", "toy.steps=4"]) == 0
    assert "small: resuming from step 2;" in capfd.readouterr().out
    steps = [json.loads(line)["step"] for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    log = (RUN / "log.txt").read_text()
    assert (
        log.index("attempt 1") < log.index("about step 2\n") < log.index("attempt 2") < log.index("step 3\n")
    )


def test_a_fresh_start_forgets_the_metrics_of_an_attempt_that_saved_nothing(
    finished: str,
) -> None:
    (RUN / "checkpoints" / "step").unlink()
    assert main(["run", finished, "--set", "toy.steps=1", "--set", "activation=gelu"]) == 0
    assert len((RUN / "metrics.jsonl").read_text().splitlines()) == 1


def test_several_runs_go_into_one_folder(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", toy_spec("a", steps=1), toy_spec("b", steps=1), "--output", "out", "--dry-run"]) == 0
    printed = capfd.readouterr().out
    assert [f"--run-dir={Path('out').absolute()}/{name} " in printed for name in "ab"] == [True, True]


def test_a_failed_run_keeps_the_next_ones_from_starting(toy_spec: Callable[..., str]) -> None:
    failing, waiting = toy_spec("a", steps=1, fail_at=1), toy_spec("b", steps=1)
    assert main(["run", failing, waiting]) == 1
    assert sorted(path.name for path in Path("outputs").iterdir()) == ["a"]


def test_one_run_goes_where_output_says(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", toy_spec("a", steps=1), "--output", "out/x", "--dry-run"]) == 0
    assert f"--run-dir={Path('out/x').absolute()} " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["trainer=tox"], "unknown trainer 'tox' (did you mean 'toy'?)"),
        (["toy.steps=null"], "b: toy.steps is missing"),
        (["toy.needs=nowhere.bin"], "b: toy.needs: nowhere.bin not found"),
        (["name=a"], "give each its own `name:`"),
    ],
)
def test_a_mistake_in_any_of_several_specs_stops_all_before_one_starts(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str], changes: list[str], sentence: str
) -> None:
    good, wrong = toy_spec("a", steps=1), toy_spec("b", steps=1)
    content = yaml.safe_load(Path(wrong).read_text())
    for change in changes:
        key, _, value = change.partition("=")
        section = content["toy"] if "." in key else content
        section[key.rpartition(".")[2]] = yaml.safe_load(value)
    if content["trainer"] != "toy":
        del content["toy"]
    Path(wrong).write_text(yaml.safe_dump(content))
    assert main(["run", good, wrong]) == 2
    error = capfd.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not Path("outputs").exists()


def test_metrics_are_set_aside_where_a_checkpoint_is_left_from_which_nobody_can_go_on(finished: str) -> None:
    logged = (RUN / "metrics.jsonl").read_text()
    (RUN / "checkpoints" / "step").unlink()
    (RUN / "checkpoints" / "iter_0000002").mkdir()
    assert main(["run", finished, "--set", "toy.steps=1"]) == 0
    assert (RUN / "metrics.before-attempt-2.jsonl").read_text() == logged
    assert (RUN / "coefficients.before-attempt-2.json").exists()
    assert len((RUN / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_half_written_line_of_metrics_spoils_no_other(finished: str) -> None:
    with (RUN / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "metr')
    assert main(["run", finished, "--set", "toy.steps=3"]) == 0
    assert json.loads((RUN / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3


def test_an_unreadable_record_of_attempts_is_not_taken_for_none(
    finished: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (RUN / "versions.json").write_text("")
    assert main(["run", finished]) == 2
    assert "outputs/small/versions.json cannot be read" in capfd.readouterr().err
    assert (RUN / "versions.json").read_text() == ""


def test_a_complete_run_whose_coefficients_cannot_be_read_says_so_and_is_complete(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    spec = toy_spec(steps=1, size=13)
    assert main(["run", spec]) == 0
    error = capfd.readouterr().err
    assert (
        error == "small: complete, but without coefficients.json: no coefficients can be read from size 13\n"
    )
    assert main(["run", spec]) == 0
    assert "already complete" in capfd.readouterr().out


def test_a_disk_that_fills_up_ends_a_run_with_one_sentence_and_its_checkpoint_stays(
    toy_spec: Callable[..., str], small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = small_disk / "small"
    assert main(["run", toy_spec(steps=1), "--output", str(run_dir)]) == 0
    capfd.readouterr()
    assert main(["run", toy_spec(steps=2, fill=3), "--output", str(run_dir)]) == 2
    error = capfd.readouterr().err
    full = f"the disk of {run_dir.absolute()} is full; make room there, and the same command goes on from"
    assert f"{full} the checkpoint of step 1\n" in error
    assert "polycom_ext" not in error
    assert main(["run", toy_spec(steps=2), "--output", str(run_dir)]) == 2
    assert "No space left on device; make room, then give the same command again" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("/proc/x", "/proc/x: No such file or directory"),
        ("small.yaml", "small.yaml is a file, not a folder: give another --output"),
        ("n" * 300, "File name too long"),
    ],
)
def test_a_run_directory_that_cannot_be_made_is_one_sentence(
    toy_spec: Callable[..., str], output: str, sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", toy_spec(steps=1), "--output", output]) == 2
    error = capfd.readouterr().err
    assert error.startswith("polycom run: ")
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("output", "sentence"), [("", "it is empty"), ("/", "/ is the root folder")])
def test_an_empty_output_and_the_root_folder_are_refused(
    toy_spec: Callable[..., str], output: str, sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["run", toy_spec(steps=1), "--output", output])
    assert exit_.value.code == 2
    assert f"argument --output: {sentence}" in capfd.readouterr().err


@pytest.mark.full
def test_the_folder_itself_can_be_the_run_directory(toy_spec: Callable[..., str]) -> None:
    assert main(["run", toy_spec(steps=1), "--output", "."]) == 0
    assert Path("run.yaml").exists()


NOBODY = "setpriv --reuid 12345 --regid 12345 --clear-groups --inh-caps +dac_read_search "
NOBODY += "--ambient-caps +dac_read_search env -u HOME -u USER -u LOGNAME"
"""A user as containers have them, without name and home; it may read all, as Python may be in root's home."""


@pytest.mark.full
def test_a_user_without_name_and_home_can_train(toy_spec: Callable[..., str], polycom: list[str]) -> None:
    if subprocess.run([*NOBODY.split(), "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to become another user")
    spec = toy_spec(steps=1)
    Path.cwd().chmod(0o777)
    command = [*NOBODY.split(), *polycom, "run", spec]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    (RUN / "checkpoints" / "step").unlink()
    subprocess.run([*NOBODY.split(), RUN / "command.sh"], capture_output=True, timeout=120, check=True)
