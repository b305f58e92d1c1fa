"""Every command and every piece of Python in the pages runs, on the smallest scale.

RULES says how a command is run; one that no rule knows fails.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
import zstandard

from .conftest import PAGES, TOP, name, tokens

THIRD_PARTY = TOP / "tests" / "runs" / "third_party"
SHORT = {
    "megatron": "num-layers=1 global-batch-size=2 micro-batch-size=2 train-iters=2 lr-warmup-iters=1 "
    "eval-iters=1 eval-interval=2 save-interval=2 log-interval=1",
    "olmo": "model.n_layers=1 global_train_batch_size=2 device_train_microbatch_size=1 max_duration=2 "
    "scheduler.t_warmup=1 eval_interval=2 save_interval=2 console_log_interval=1 evaluators=null",
}
"""Trainer -> the options, of its section, of a training that only begins."""


class Place:
    """A copy of the checkout in which a reader works, and a home of theirs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkout, self.home = folder, folder / "checkout", folder / "home"
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(listed, cwd=TOP, capture_output=True, text=True, check=True).stdout.split("\0")
        compiled = [str(path.relative_to(TOP)) for path in (TOP / "polycom_ext").rglob("*.so")]
        for file in filter(None, [*files, *compiled]):
            if (TOP / file).is_file():
                (self.checkout / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(TOP / file, self.checkout / file)
        self.home.mkdir()
        self.trained: set[str] = set()
        (self.home / ".gitconfig").write_text("[user]\n\tname = A Reader\n\temail = reader@example.org\n")

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{self.checkout}{os.pathsep}{THIRD_PARTY}",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-euc", command],
            cwd=self.checkout,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str) -> None:
        began = os.times()
        finish(self.start(command))
        ended = os.times()
        print(
            f"{ended.elapsed - began.elapsed:5.1f} {ended.children_user - began.children_user:5.1f} {command}"
        )


def finish(running: subprocess.Popen[str]) -> None:
    try:
        said, _ = running.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        raise
    assert running.returncode == 0, f"{running.args!r}\n{said}"


def as_written(place: Place, command: str) -> None:
    place.run(command)


def known_to_make(place: Place, command: str) -> None:
    """The Makefile's own targets take minutes: CI and a release run them. Here only that it has them."""
    place.run(command.replace("make", "make --dry-run", 1))


def of_the_internet(place: Place, command: str) -> None:
    """A corpus of terabytes, of which tests/data fetches a stand-in. Here only what the recipe says."""
    place.run(f"{command} --dry-run")


def from_here(place: Place, command: str) -> None:
    """The address of the pages is that of this repository here."""
    place.run(f"cd {place.folder} && " + command.replace("ADDRESS", shlex.quote(str(TOP))))


def by_this_python(place: Place, command: str) -> None:
    place.run(command.replace(".venv/bin/", f"{shlex.quote(sys.executable)} -m ", 1))


def shortened(place: Place, command: str) -> None:
    """A training of two steps; a spec that was trained is not trained again."""
    [spec] = re.findall(r"\S+\.yaml", command)
    trainer = "olmo" if "olmo" in spec else "megatron"
    again = "--dry-run" if spec in place.trained else ""
    place.run(" ".join([command, again, *(f"--set {trainer}.{option}" for option in SHORT[trainer].split())]))
    place.trained.add(spec)


def of_a_training(place: Place, command: str) -> None:
    """The run is one of two steps, in a directory that no other page has."""
    [(config, activation)] = re.findall(r"outputs/tiny-(\w+)-(\w+)", command)
    begun = f"outputs/begun-{config}-{activation}"
    sets = " ".join(f"--set megatron.{option}" for option in SHORT["megatron"].split())
    place.run(f"polycom run configs/tiny/{config}.yaml --set activation={activation} --output {begun} {sets}")
    place.run(command.replace(f"outputs/tiny-{config}-{activation}", begun))


def of_few_documents(place: Place, command: str) -> None:
    """One task of a training of two steps."""
    of_a_training(place, f"{command} --tasks copa --limit 2")


def known_to_pip(place: Place, command: str) -> None:
    """An index is not asked; here only that the package has such an extra."""
    [extra] = re.findall(r"\[(\w+)\]", command)
    assert f"\n{extra} = [" in (place.checkout / "pyproject.toml").read_text()


def with_a_pin(place: Place, command: str) -> None:
    """The page's reader has pinned another version, which is the same one here."""
    pins = place.checkout / "patches" / "pins.toml"
    [pinned] = re.findall(r"(?ms)^\[megatron\]\n.*?(?=^\[(?!megatron))", pins.read_text())
    another = re.sub(r"""(?m)^(\[|series = ")megatron""", r"\1megatron-next", pinned)
    pins.write_text(f"{pins.read_text()}\n{another}")
    place.run(command)


def on_each_node(place: Place, command: str) -> None:
    """The nodes are processes of this machine, and the run is the toy trainer's."""
    environment = {"GLOO_SOCKET_IFNAME": "lo", "TOY_SPEC": "a b"}
    spec = {"trainer": "toy", "activation": "polynorm", "nodes": 2, "environment": environment}
    (place.checkout / "NAME.yaml").write_text(yaml.safe_dump({**spec, "toy": {"steps": 2}}))
    place.run("polycom run NAME.yaml")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        command = command.replace("HOST:PORT", f"127.0.0.1:{listener.getsockname()[1]}")
    for node in [place.start(command.replace("--node-rank R", f"--node-rank {rank}")) for rank in range(2)]:
        finish(node)


def of_a_run(place: Place, command: str) -> None:
    """The run is the toy trainer's, and under way."""
    spec = {"trainer": "toy", "activation": "polynorm", "environment": {"TOY_SPEC": "a b"}}
    (place.checkout / "NAME.yaml").write_text(yaml.safe_dump({**spec, "toy": {"steps": 100, "seconds": 0.2}}))
    shutil.rmtree(place.checkout / "outputs" / "NAME", ignore_errors=True)
    running = place.start("polycom run NAME.yaml")
    deadline = time.monotonic() + 60
    while not (place.checkout / "outputs" / "NAME" / "pid-0").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    try:
        place.run(command)
    finally:
        running.terminate()
        running.communicate()


Rule = Callable[[Place, str], None]


def planned(place: Place, command: str) -> None:
    """Rehearsals are trained in tests/configs."""
    place.run(f"{command} --dry-run")


RULES: tuple[tuple[str, Rule], ...] = (
    (r"make [\w-]+", known_to_make),
    (r"git clone ADDRESS polycom && cd polycom", from_here),
    (r"polycom run .* --dry-run", as_written),
    (r"polycom run .* --rehearse.*", planned),
    (r"polycom run .*", shortened),
    (r"polycom node .*", on_each_node),
    (r"polycom (logs|stop) .*", of_a_run),
    (r"pip install 'polycom-ext\[\w+\]'", known_to_pip),
    (r"polycom eval .*--tokens.*", of_a_training),
    (r"polycom eval .*", of_few_documents),
    (r"polycom (analyze|convert) outputs/.*", of_a_training),
    (r"polycom data fetch .*", of_the_internet),
    (r"polycom (convert|upstream|data|status|report|doctor|plan)( .*)?", as_written),
    (r"mkdir patches/megatron-next .*", with_a_pin),
    (r"git .*", as_written),
    (r"\.venv/bin/pytest .*", by_this_python),
)
"""What a whole command looks like -> how it is run; the first that fits."""


def commands(page: Path) -> list[str]:
    """The lines of a page's blocks of commands."""
    blocks = [token.content for token in tokens(page) if token.type == "fence" and token.info == "sh"]
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return list(filter(None, lines))


def rule(command: str) -> Rule | None:
    return next((how for form, how in RULES if re.fullmatch(form, command)), None)


WITH_COMMANDS = [page for page in PAGES if commands(page)]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_it_is_known_how_each_command_is_run(page: Path) -> None:
    assert [command for command in commands(page) if rule(command) is None] == []
    blocks = {token.info for token in tokens(page) if token.type == "fence"}
    assert blocks <= {"sh", "python", "toml", "diff", "yaml", "{toctree}"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Where the demos' data are, made of a text at hand, and a corpus and a clone of a reader's own."""
    made = Place(tmp_path_factory.mktemp("reader"))
    sources = sorted(TOP.glob("polycom_ext/**/*.py"))
    (made.checkout / "text.txt").write_text("\n\n".join(path.read_text() for path in sources))
    lines = "".join(f'{{"text": "line {number} of a corpus"}}\n' for number in range(2000))
    (made.checkout / "corpus.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    for folder, form in (("demo", "megatron"), ("demo-olmo", "olmo")):
        prepare = f"polycom data prepare text.txt --format {form} --output build/{folder}"
        made.run(f"{prepare}/train --train-tokenizer 2048")
        made.run(f"{prepare}/valid --tokenizer build/{folder}/train.tokenizer.json")
    made.run("polycom upstream fetch megatron && cp -r .upstream/megatron ~/Megatron-LM")
    made.run("cd ~/Megatron-LM && rm -rf .git && git init -q && git add -A && git commit -qm Theirs")
    return made


@pytest.mark.full
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name)
def test_each_command_runs(page: Path, place: Place) -> None:
    for command in commands(page):
        how = rule(command)
        assert how is not None, command
        how(place, command)


def pieces_of_python(page: Path) -> list[str]:
    return [token.content for token in tokens(page) if token.type == "fence" and token.info == "python"]


@pytest.mark.parametrize("page", [page for page in PAGES if pieces_of_python(page)], ids=name)
def test_python_is_an_examples_or_runs_by_itself(page: Path) -> None:
    examples = [path.read_text() for path in (TOP / "examples").rglob("*.py")]
    for piece in pieces_of_python(page):
        if not any(piece in example for example in examples):
            exec(compile(piece, str(page), "exec"), {})
