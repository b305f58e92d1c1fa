"""Acceptance on a GPU, in one command; its steps have eight minutes at most together.

    python benchmarks/accept.py [--output DIRECTORY]     # where torch sees a GPU and nvcc is of its CUDA
    python benchmarks/accept.py --device cpu --short      # the same from end to end without one: a rehearsal

Builds the operations for this GPU, if they are not there; checks them (benchmarks/checks.py; a part of it
under compute-sanitizer, where that is installed), measures the paper's widths (benchmarks/activations.py,
bfloat16, blocks included) and what an activation adds to a network (benchmarks/overhead.py), and trains a
model of the paper's width on patched Megatron-LM (benchmarks/one-gpu.yaml). Writes one page,
DATE-CARD.md (the machine as `polycom doctor` sees it, how each step went, the checks, what
benchmarks/results/kernels.md expected beside what was measured, the tables), DATE-CARD.csv with the
measurements, and DATE-CARD.log with all that the steps said. Each step is run even if one before it failed,
and the page is written after each; the exit status is 1 if a step failed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
WIDTHS = (1536, 8192, 8256, 16384)
PROVIDERS = ("polycom", "authors", "compiled", "gelu", "swiglu", "liger")
SECONDS = {
    "doctor": 25, "build": 120, "checks": 60, "sanitizer": 25, "benchmark": 80, "overhead": 80, "train": 90,
}  # fmt: skip
"""A step that takes longer is ended, so that the next ones have their turn."""
SANITIZED = ("misaligned", "NaN", "no rows")
"""Words of the checks that are made under compute-sanitizer, which is slow."""
PROBE = """
import json, sys, torch
from polycom_ext.ops.polynomial import library
device = torch.device(sys.argv[1])
capability = torch.cuda.get_device_capability(device)
there = f"sm_{capability[0]}{capability[1]}" in library.cuda_architectures()
built = there and not library.gpu_problem(device.index or 0)
print(json.dumps([torch.cuda.get_device_name(device), "%d.%d" % capability, built]))
"""
"""Asked in a process of its own: one that has used a GPU holds it to its end, and some are not shared."""
PARTS = ("checks.json", "measured.csv", "measured.md", "measured.png", "overhead.csv", "overhead.md")
"""Files of single steps, beside the page while it is being made."""


@dataclass(frozen=True)
class Step:
    """How a step went."""

    name: str
    status: str
    """Exit status, or why there is none."""
    seconds: float = 0.0
    output: str = ""

    @property
    def succeeded(self) -> bool:
        return self.status == "0" or self.status.startswith("left out")


def run(
    log: Path, name: str, command: list[str], environment: dict[str, str], most: float | None = None
) -> Step:
    """Run one step, its output to the log and its end to the screen."""
    start, most = time.monotonic(), SECONDS[name] if most is None else most
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        step = Step(name, f"cannot be started: {error}")
    else:
        try:
            output, status = process.communicate(timeout=most)[0], str(process.returncode)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the compilers or workers that it started, too
            output, status = process.communicate()[0], f"ended after {most:.0f} s"
        step = Step(name, status, time.monotonic() - start, output)
    said = f"{name}: status {step.status}, {step.seconds:.0f} s"
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n{step.output}\n{said}\n\n")
    print("\n".join([*step.output.splitlines()[-3:], said]), flush=True)
    return step


def run_checks(log: Path, command: list[str], environment: dict[str, str]) -> Step:
    """In another process from where one has ended: what breaks on a GPU may take its process with it."""
    name, begin = "checks", time.monotonic()
    results = Path(command[command.index("--output") + 1])
    step, left = run(log, name, command, environment), _unmade(results)
    while left and (most := SECONDS[name] - (time.monotonic() - begin)) > 10:
        more = run(log, name, [*command, "--resume"], environment, most)
        step = Step(name, more.status, time.monotonic() - begin, f"{step.output}\n{more.output}")
        before, left = left, _unmade(results)
        if left == before:
            break
    return step


def _unmade(results: Path) -> list[str]:
    """Checks without a result, of those that were begun with."""
    if not results.exists():
        return []
    return [one["check"] for one in json.loads(results.read_text()) if one["status"] in ("begun", "not made")]


def under_sanitizer(log: Path, command: list[str], environment: dict[str, str]) -> Step:
    """Without torch's own stock of memory, in which nothing is out of bounds; not to work is no fault."""
    step = run(log, "sanitizer", command, environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if "Device not supported" in step.output:
        return replace(step, status="left out: compute-sanitizer does not support this GPU")
    if step.status.startswith("ended after"):
        return replace(step, status=f"left out: not at its end, {step.status}")
    return step


def on_megatron(log: Path, command: list[str], environment: dict[str, str]) -> Step:
    """What is refused, as where nothing can be fetched, is no fault of the operations."""
    step = run(log, "train", command, environment)
    if step.status == "2":
        return replace(step, status=f"left out: {step.output.strip().splitlines()[-1]}")
    return step


def find_sanitizer() -> str | None:
    """On PATH, or beside nvcc."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")


def commands(base: Path, device: str, short: bool) -> dict[str, list[str]]:
    """Step -> its command; none where it must be left out."""
    python, gpu = sys.executable, device.startswith("cuda")
    checks = [python, "benchmarks/checks.py", "--device", device]
    train = [python, "-m", "polycom_ext.cli", "run", "benchmarks/one-gpu.yaml", "--output", f"{base}-runs"]
    few = ["--set", "megatron.num-layers=4", "--each", "activation=gelu,polynorm"]
    if short or not gpu:
        steps = ("megatron.train-iters=4", "megatron.lr-warmup-iters=1", "activation=polynorm")
        few = ["--rehearse", *(word for step in steps for word in ("--set", step))]
    sanitizer = find_sanitizer() if gpu else None
    small = ["--rows", "64", "--repetitions", "2", "--rounds", "1", "--hidden", "32"] if short else []
    little = ["--tokens", "64", "--hidden", "64", "--width", "96", "--repetitions", "2"] if short else []
    return {
        "doctor": [python, "-m", "polycom_ext.cli", "doctor"],
        "build": [python, "polycom_ext/ops/build.py", *(["--cuda"] if gpu else [])],
        "checks": [*checks, "--output", f"{base}-checks.json", *(["--short"] if short else [])],
        "sanitizer": [] if sanitizer is None else [
            *(sanitizer, "--error-exitcode", "9", "--report-api-errors", "no"),
            *(*checks, "--short", "--output", os.devnull, "--only", *SANITIZED),
        ],
        "benchmark": [
            python, "benchmarks/activations.py", "--device", device, "--seconds", "0.4",
            "--widths", *map(str, WIDTHS[:1] if short else WIDTHS), "--dtypes", "bfloat16",
            "--providers", *PROVIDERS, *small, "--output", f"{base}-measured",
        ],
        "overhead": [
            python, "benchmarks/overhead.py", "--device", device, "--dtypes", "bfloat16", *little,
            "--output", f"{base}-overhead",
        ],
        "train": [*train, *few],
    }  # fmt: skip


def beside_the_model(measured: Path, card: str) -> str:
    """What kernels.md expects of such a card, and what was measured, autograd's own time included."""
    expected = {}
    for line in (ROOT / "benchmarks" / "results" / "kernels.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 10 and cells[1] == "bfloat16" and cells[3] in card:
            expected[cells[0], cells[2]] = cells[9]
    lines = ["| direction | width | expected | measured |", "|---|---|---|---|"]
    with measured.open() as file:
        for row in csv.DictReader(file):
            if row["provider"] == "polycom" and row["mode"] in ("forward", "backward"):
                model = expected.get((row["mode"], row["width"]), "?")
                cells = [row["mode"], row["width"], model, f"{float(row['share_of_copy']):.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(title: str, base: Path, card: str, steps: list[Step]) -> str:
    """All that is known so far."""
    command = " ".join(["python", *sys.argv])
    parts = [f"# {title}", f"{datetime.date.today().isoformat()}, `{command}`."]
    rows = [f"| {one.name} | {one.status} | {one.seconds:.0f} |" for one in steps]
    parts.append("\n".join(["| step | exit status | seconds |", "|---|---|---|", *rows]))
    if (path := Path(f"{base}-checks.json")).exists():
        rows = [
            f"| {one['check']} | {one['status']} | {_cell(one['text'])} |"
            for one in json.loads(path.read_text())
        ]
        parts += ["## Checks", "\n".join(["| check | | |", "|---|---|---|", *rows])]
    if (path := Path(f"{base}-measured.csv")).exists():  # as far as the benchmark came
        about = "Shares of a copy's rate; expected is what a model of the card gives (kernels.md)."
        parts += ["## Beside the model", about, beside_the_model(path, card)]
    for measured in ("measured", "overhead"):
        if (path := Path(f"{base}-{measured}.md")).exists():
            parts.append(path.read_text().replace("# ", "## ", 1))
    if (runs := Path(f"{base}-runs")).exists():
        parts += ["## Trained on Megatron-LM", trained(runs)]
    parts += [f"## Said by {one.name}\n\n```\n{one.output.strip()}\n```" for one in steps if _is_told(one)]
    return "\n\n".join(parts) + "\n"


def trained(runs: Path) -> str:
    """How the runs went, and what they took."""
    command = [sys.executable, "-m", "polycom_ext.cli", "status", str(runs)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return f"```\n{told.stdout.strip().replace(f'{runs.parent}/', '')}\n```"


def _is_told(step: Step) -> bool:
    return bool(step.output) and (step.name == "doctor" or not step.succeeded)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    """Every step, and the page after each."""
    parser = argparse.ArgumentParser(description="Build, check and measure on a GPU.")
    results = Path(os.environ.get("OUT", ROOT / "benchmarks/results"))
    parser.add_argument("--output", type=Path, default=results)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--short", action="store_true", help="little of everything")
    args = parser.parse_args()
    gpu = args.device.startswith("cuda")
    if gpu and not torch.cuda.is_available():
        print("torch sees no GPU here; --device cpu --short rehearses this without one", file=sys.stderr)
        return 2
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths}
    card, built = "CPU", False
    if gpu:
        asked = [sys.executable, "-c", PROBE, args.device]
        told = subprocess.run(asked, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if told.returncode:
            reason = (told.stderr.strip().splitlines() or ["it does not answer"])[-1]
            print(f"{args.device} cannot be used: {reason}", file=sys.stderr)
            return 2
        card, environment["TORCH_CUDA_ARCH_LIST"], built = json.loads(told.stdout.splitlines()[-1])
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    args.output.mkdir(parents=True, exist_ok=True)
    base = (args.output / f"{datetime.date.today().isoformat()}-{name}").absolute()
    for part in PARTS:  # of another time today
        Path(f"{base}-{part}").unlink(missing_ok=True)
    shutil.rmtree(f"{base}-runs", ignore_errors=True)
    log = Path(f"{base}.log")
    log.write_text(f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    ways = {"checks": run_checks, "sanitizer": under_sanitizer, "train": on_megatron}
    steps: list[Step] = []
    for step, command in commands(base, args.device, args.short).items():
        if not command:
            steps.append(Step(step, "left out: compute-sanitizer is not on PATH, or there is no GPU"))
        elif step == "build" and built:
            steps.append(Step(step, "left out: the operations are there, of these sources and for this GPU"))
        elif way := ways.get(step):
            steps.append(way(log, command, environment))
        else:
            steps.append(run(log, step, command, environment))
        Path(f"{base}.md").write_text(page(f"Acceptance on {card}", base, card, steps))
    shutil.rmtree(f"{base}-runs", ignore_errors=True)  # with its checkpoints
    for kept in ("csv", "png"):
        if (path := Path(f"{base}-measured.{kept}")).exists():
            path.replace(f"{base}.{kept}")
    for part in PARTS:  # the others are in the page
        Path(f"{base}-{part}").unlink(missing_ok=True)
    print(f"{base}.md")
    return 0 if all(step.succeeded for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
