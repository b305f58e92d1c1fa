"""`polycom eval CKPT …`: lm-eval on the paper's tasks, and losses on token files, of trained models."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from polycom_ext import arguments, trainers
from polycom_ext.errors import PolycomError
from polycom_ext.evaluation import harness, published, results, sources, tables
from polycom_ext.evaluation.data import HUB
from polycom_ext.evaluation.sources import Checkpoint
from polycom_ext.runs.record import EVALUATION
from polycom_ext.runs.rendering import NODE_RANK

TORCHRUN, WORKER = "polycom_ext.runs.torchrun", "polycom_ext.evaluation.worker"
LOG = "workers.txt"
"""What libraries say while they measure."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="CKPT",
        help="a run's directory (its newest checkpoint), a checkpoint, or a folder of Hugging Face",
    )
    parser.add_argument(
        "--tasks", metavar="A,B", help="names of lm-eval's (default: the paper's, unless --tokens)"
    )
    parser.add_argument(
        "--data",
        default=HUB,
        choices=[HUB, *trainers.task_data_names()],
        help="where the tasks' data are: on the hub, or here, from an upstream (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        action="append",
        default=[],
        metavar="[LABEL=]FILE",
        help="also the loss and the perplexity on a token file; may be given several times",
    )
    parser.add_argument(
        "--window", type=arguments.count, metavar="N", help="its windows (default: the model's context)"
    )
    parser.add_argument(
        "--limit", type=arguments.count, metavar="N", help="documents a task, windows a file, at most"
    )
    parser.add_argument(
        "--num-fewshot", type=arguments.count_or_none, metavar="N", help="examples (default: the task's)"
    )
    parser.add_argument(
        "--max-length",
        type=arguments.count,
        metavar="N",
        help="tokens of a prompt and its answer (default: the context); longer prompts lose their beginning",
    )
    parser.add_argument(
        "--batch-size", type=_batch_size, default="16", metavar="N", help="or `auto` (default: %(default)s)"
    )
    parser.add_argument(
        "--processes",
        type=arguments.count,
        default=1,
        metavar="N",
        help="on a GPU each, where there are (default: 1)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json, for a checkpoint that has none"
    )
    parser.add_argument(
        "--include-path",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="task files of your own, as lm-eval takes them",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that lies beside a model's weights"
    )
    parser.add_argument(
        "--output",
        type=arguments.output,
        metavar="DIR",
        help="where the numbers go (default: the run's directory); the folder of theirs with several CKPTs",
    )


def main(args: argparse.Namespace) -> int:
    """Measure what was not measured yet; print the numbers beside the paper's."""
    harness.check()
    tokens = _labelled(args.tokens)
    tasks = _tasks(args, bool(tokens))
    checkpoints = [sources.find(path, _output(args, path)) for path in args.sources]
    _refuse_shared(checkpoints)
    plan = _plan(args)
    with ExitStack() as stack:
        models = []
        for one in checkpoints:
            stack.enter_context(sources.prepared(one, args.tokenizer))
            models.append(_left(one, tasks, tokens, plan))
        todo = [model for model in models if model["tasks"] or model["tokens"]]
        if todo:
            _run({**plan, "models": todo}, args.processes)
        for one in checkpoints:
            print(tables.text(one.name, results.read(one.output) or {}))
            print(f"{one.output / EVALUATION}")
    return 0


def _batch_size(text: str) -> str:
    return text if text == "auto" else str(arguments.count(text))


def _labelled(given: Sequence[str]) -> dict[str, str]:
    """LABEL -> path; without a label, the file's name."""
    named = {}
    for text in given:
        label, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            label, path = Path(text).name, text
        if not label or not path or label in named:
            raise PolycomError(f"--tokens {text}: each file needs a label of its own, as in LABEL=FILE")
        named[label] = os.path.abspath(path)
    return named


def _tasks(args: argparse.Namespace, others: bool) -> list[str]:
    if args.tasks is not None:
        names = list(dict.fromkeys(filter(None, (name.strip() for name in args.tasks.split(",")))))
        if not names:
            raise PolycomError("--tasks names no task; leave it out for the paper's")
        return names
    names = [] if others else list(published.tasks())
    if args.data == HUB:
        return names
    there = trainers.task_data(args.data).tasks()
    if lacking := [name for name in names if name not in there]:
        print(f"--data {args.data} has nothing for {', '.join(lacking)}: left out")
    return [name for name in names if name in there]


def _output(args: argparse.Namespace, path: Path) -> Path | None:
    if args.output is None or len(args.sources) == 1:
        folder: Path | None = args.output
        return folder
    return Path(args.output) / path.resolve().name


def _refuse_shared(checkpoints: Sequence[Checkpoint]) -> None:
    places = [one.output.resolve() for one in checkpoints]
    for one, place in zip(checkpoints, places, strict=True):
        if places.count(place) > 1:
            raise PolycomError(
                f"the numbers of several checkpoints would go to {one.output}; evaluate them one by one"
            )


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    names = ("data", "limit", "num_fewshot", "max_length", "batch_size", "window", "trust_remote_code")
    return {
        **{name: getattr(args, name) for name in names},
        "include": [os.path.abspath(path) for path in args.include_path],
        "command": shlex.join(["polycom", *sys.argv[1:]]),
    }


def _left(
    one: Checkpoint, tasks: Sequence[str], tokens: Mapping[str, str], plan: Mapping[str, Any]
) -> dict[str, Any]:
    """What is yet to be measured of a checkpoint."""
    wanted = results.task_settings(plan)
    return {
        "name": one.name,
        "folder": str(one.folder),
        "output": str(one.output),
        "tasks": [name for name in tasks if not results.has(one.output, "tasks", name, wanted)],
        "tokens": {
            label: path
            for label, path in tokens.items()
            if not results.has(one.output, "tokens", label, results.token_settings(plan, path))
        },
    }


def _run(plan: Mapping[str, Any], processes: int) -> None:
    """Have it measured by a process of its own, or by several."""
    with tempfile.TemporaryDirectory() as scratch:
        file, refusal = Path(scratch) / "plan.json", Path(scratch) / "refusal"
        file.write_text(json.dumps({**plan, "refusal": str(refusal)}), encoding="utf-8")
        start = [sys.executable, "-m"]
        if processes > 1:
            start += [TORCHRUN, "--standalone", "--nproc-per-node", str(processes), "-m"]
        alone = processes == 1 and sys.stderr.isatty()  # bars are of use
        said = nullcontext() if alone else (Path(plan["models"][0]["output"]) / LOG).open("wb")
        with said as log:
            status = subprocess.run(
                [*start, WORKER, str(file)],
                env={**os.environ, **harness.environment(plan["data"] != HUB), NODE_RANK: "0"},
                stderr=log,
                check=False,
            ).returncode
        if refusal.exists():
            raise PolycomError(refusal.read_text(encoding="utf-8", errors="surrogateescape"))
    if status:
        where = "" if log is None else f": see {log.name}"
        raise PolycomError(f"what measures has ended with status {status}{where}")
