"""Everything to know of the operations on a GPU, in one command; its steps have seven minutes at most.

    python benchmarks/gpu.py [--output DIRECTORY]     # where torch sees a GPU and nvcc is of its CUDA

Builds the operations for this GPU, runs the tests of the public functions on it, and measures the paper's
widths (benchmarks/activations.py, bfloat16). Writes DATE-CARD.md, .csv and .png as that script does, and
DATE-CARD.log: versions, what the tests said, and what benchmarks/results/kernels.md expected beside what was
measured. Each step is run even if one before it failed; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
WIDTHS = (1536, 8192, 8256, 16384)
TESTS = ("tests/test_functional.py", "tests/test_edges.py", "-k", "cuda")
SECONDS = {"build": 150, "tests": 120, "benchmark": 120}
"""A step that takes longer is ended, so that the next ones have their turn."""


def run(log: Path, step: str, command: list[str], environment: dict[str, str]) -> bool:
    """Run one step, its output to the log and its end to the screen; returns whether it succeeded."""
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, status = process.communicate(timeout=SECONDS[step])[0], str(process.returncode)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the compilers or workers that it started, too
        output, status = process.communicate()[0], f"ended after {SECONDS[step]} s"
    said = f"{step}: status {status}, {time.monotonic() - start:.0f} s"
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n{output}\n{said}\n\n")
    print("\n".join([*output.splitlines()[-3:], said]), flush=True)
    return status == "0"


def driver() -> str:
    """What nvidia-smi says, if it is there."""
    if (program := shutil.which("nvidia-smi")) is None:
        return "no nvidia-smi on PATH"
    result = subprocess.run(
        [program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return result.stdout


def beside_the_model(measured: Path, card: str) -> str:
    """What kernels.md expects of such a card, and what was measured, autograd's own time included."""
    expected = {}
    for line in (ROOT / "benchmarks" / "results" / "kernels.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 10 and cells[1] == "bfloat16" and cells[3] in card:
            expected[cells[0], cells[2]] = cells[9]
    lines = ["direction width expected measured (shares of a copy's rate)"]
    with measured.open() as file:
        for row in csv.DictReader(file):
            if row["provider"] == "polycom" and row["mode"] in ("forward", "backward"):
                model = expected.get((row["mode"], row["width"]), "?")
                lines.append(f"{row['mode']} {row['width']} {model} {float(row['share_of_copy']):.2f}")
    return "\n".join(lines)


def main() -> int:
    """Build, test, measure."""
    parser = argparse.ArgumentParser(description="Build, test and measure on a GPU.")
    parser.add_argument(
        "--output", type=Path, default=Path(os.environ.get("OUT", ROOT / "benchmarks/results"))
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no GPU here; benchmarks/activations.py measures the CPU", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    args.output.mkdir(parents=True, exist_ok=True)
    base = args.output / f"{datetime.date.today().isoformat()}-{name}"
    log = base.with_suffix(".log")
    log.write_text(f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}\n{driver()}\n")
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": capability, "PYTHONPATH": str(ROOT)}
    python = sys.executable
    steps = {
        "build": [python, "polycom_ext/ops/build.py", "--cuda"],
        "tests": [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
        "benchmark": [
            python, "benchmarks/activations.py", "--widths", *map(str, WIDTHS), "--dtypes", "bfloat16",
            "--providers", "polycom", "compiled", "gelu", "liger", "--no-block", "--output", str(base),
        ],
    }  # fmt: skip
    succeeded = [run(log, step, command, environment) for step, command in steps.items()]
    if (measured := base.with_suffix(".csv")).exists():  # as far as the benchmark came
        table = beside_the_model(measured, card)
        with log.open("a") as file:
            file.write(f"{table}\n")
        print(table)
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    sys.exit(main())
