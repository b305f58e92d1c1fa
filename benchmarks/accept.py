"""Acceptance on a GPU, in one command; its steps have eight minutes at most together.

    python benchmarks/accept.py [--output DIRECTORY]     # where torch sees a GPU and nvcc is of its CUDA
    python benchmarks/accept.py --device cpu --short      # the same from end to end without one: a rehearsal

Builds the operations for this GPU, checks them (benchmarks/checks.py; a part of it under compute-sanitizer,
where that is installed), and measures the paper's widths (benchmarks/activations.py, bfloat16, blocks
included). Writes one page, DATE-CARD.md (the machine as `polycom doctor` sees it, how each step went, the
checks, what benchmarks/results/kernels.md expected beside what was measured, the tables), DATE-CARD.csv with
the measurements, and DATE-CARD.log with all that the steps said. Each step is run even if one before it
failed, and the page is written after each; the exit status is 1 if a step failed.
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
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
WIDTHS = (1536, 8192, 8256, 16384)
PROVIDERS = ("polycom", "authors", "compiled", "gelu", "swiglu", "liger")
SECONDS = {"doctor": 30, "build": 150, "checks": 100, "sanitizer": 60, "benchmark": 135}
"""A step that takes longer is ended, so that the next ones have their turn."""
SANITIZED = ("misaligned", "NaN", "no rows")
"""Words of the checks that are made under compute-sanitizer, which is slow."""
PARTS = ("checks.json", "measured.csv", "measured.md", "measured.png")
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


def run(log: Path, name: str, command: list[str], environment: dict[str, str]) -> Step:
    """Run one step, its output to the log and its end to the screen."""
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        step = Step(name, f"cannot be started: {error}")
    else:
        try:
            output, status = process.communicate(timeout=SECONDS[name])[0], str(process.returncode)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the compilers or workers that it started, too
            output, status = process.communicate()[0], f"ended after {SECONDS[name]} s"
        step = Step(name, status, time.monotonic() - start, output)
    said = f"{name}: status {step.status}, {step.seconds:.0f} s"
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n{step.output}\n{said}\n\n")
    print("\n".join([*step.output.splitlines()[-3:], said]), flush=True)
    return step


def commands(base: Path, device: str, short: bool) -> dict[str, list[str]]:
    """Step -> its command; none where it must be left out."""
    python, gpu = sys.executable, device.startswith("cuda")
    checks = [python, "benchmarks/checks.py", "--device", device]
    sanitizer = shutil.which("compute-sanitizer") if gpu else None
    small = ["--rows", "64", "--repetitions", "2", "--rounds", "1", "--hidden", "32"] if short else []
    return {
        "doctor": [python, "-m", "polycom_ext.cli", "doctor"],
        "build": [python, "polycom_ext/ops/build.py", *(["--cuda"] if gpu else [])],
        "checks": [*checks, "--output", f"{base}-checks.json", *(["--short"] if short else [])],
        "sanitizer": [] if sanitizer is None else [
            *(sanitizer, "--error-exitcode", "9"),
            *(*checks, "--short", "--output", os.devnull, "--only", *SANITIZED),
        ],
        "benchmark": [
            python, "benchmarks/activations.py", "--device", device.partition(":")[0],
            "--widths", *map(str, WIDTHS[:1] if short else WIDTHS), "--dtypes", "bfloat16",
            "--providers", *PROVIDERS, *small, "--output", f"{base}-measured",
        ],
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
    if (path := Path(f"{base}-measured.md")).exists():
        parts.append(path.read_text().replace("# ", "## ", 1))
    parts += [f"## Said by {one.name}\n\n```\n{one.output.strip()}\n```" for one in steps if _is_told(one)]
    return "\n\n".join(parts) + "\n"


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
    card = torch.cuda.get_device_name(args.device) if gpu else "CPU"
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    args.output.mkdir(parents=True, exist_ok=True)
    base = (args.output / f"{datetime.date.today().isoformat()}-{name}").absolute()
    for part in PARTS:  # of another time today
        Path(f"{base}-{part}").unlink(missing_ok=True)
    log = Path(f"{base}.log")
    log.write_text(f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if gpu:
        environment["TORCH_CUDA_ARCH_LIST"] = ".".join(
            map(str, torch.cuda.get_device_capability(args.device))
        )
    steps = []
    for step, command in commands(base, args.device, args.short).items():
        left_out = Step(step, "left out: compute-sanitizer is not on PATH, or there is no GPU")
        steps.append(run(log, step, command, environment) if command else left_out)
        Path(f"{base}.md").write_text(page(f"Acceptance on {card}", base, card, steps))
    for kept in ("csv", "png"):
        if (path := Path(f"{base}-measured.{kept}")).exists():
            path.replace(f"{base}.{kept}")
    for part in PARTS:  # the others are in the page
        Path(f"{base}-{part}").unlink(missing_ok=True)
    print(f"{base}.md")
    return 0 if all(step.succeeded for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
