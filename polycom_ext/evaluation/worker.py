"""What measures, in a process of its own or in several of torchrun's: `python -m … PLAN`."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polycom_ext import display, trainers
from polycom_ext.errors import PolycomError
from polycom_ext.evaluation import harness, results, tokens
from polycom_ext.evaluation.data import HUB
from polycom_ext.files import write_text
from polycom_ext.runs.torchrun import end_with_parent

Plan = Mapping[str, Any]
"""`models`: [{name, folder, output, tasks: [names], tokens: {label: path}}] of what is yet to be measured;
`data`, `limit`, `num_fewshot`, `max_length`, `batch_size`, `window`, `include`, `trust_remote_code`;
`command`, to record.
"""


def run(plan: Plan) -> None:
    """Measure it all, noting each number when it is there. Raises PolycomError where data are missing."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = list(dict.fromkeys(name for one in plan["models"] for name in one["tasks"]))
    include = [Path(one) for one in plan["include"]]
    if plan["data"] != HUB:
        include.insert(0, harness.local_tasks(plan["data"]))
    known = harness.manager(names, include) if names else None
    if known and plan["data"] != HUB:
        harness.check_covered(names, known, include, plan["data"])
    loaded = {name: harness.load(name, known, plan["data"]) for name in names} if known else {}
    trainers.register_models()
    for one in plan["models"]:
        lm = harness.model(Path(one["folder"]), plan)
        for label, path in one["tokens"].items():
            _tokens(plan, one, lm, label, path)
        for name in one["tasks"]:
            _task(plan, one, lm, name, loaded[name], known)
        del lm  # before the next is loaded


def _task(plan: Plan, one: Plan, lm: Any, name: str, objects: list[Any], known: Any) -> None:
    began = time.monotonic()
    try:
        said = harness.evaluate(lm, objects, known, plan["limit"], plan["num_fewshot"])
    except AssertionError as error:  # by which lm-eval says so
        raise PolycomError(
            f"lm-eval cannot score task {name}: an answer may be longer than the {lm.max_length} tokens of "
            "the context; give it more by --max-length"
        ) from error
    if not said:
        return
    entry = {"results": said, "batch_size": plan["batch_size"], "seconds": round(time.monotonic() - began, 1)}
    results.add(Path(one["output"]), "tasks", name, results.task_settings(plan), plan["command"], entry)
    _say(one, name, results.value(name, entry), entry["seconds"])


def _tokens(plan: Plan, one: Plan, lm: Any, label: str, path: str) -> None:
    began, config = time.monotonic(), lm.model.config
    cut = tokens.windows(Path(path), plan["window"] or config.max_position_embeddings, config.vocab_size)
    batch_size = int(plan["batch_size"]) if str(plan["batch_size"]).isdigit() else 1
    said = tokens.measure(lm.model, cut, plan["limit"], batch_size)
    if lm.rank == 0:
        entry = {**said, "length": cut.length, "seconds": round(time.monotonic() - began, 1)}
        results.add(
            Path(one["output"]), "tokens", label, results.token_settings(plan, path), plan["command"], entry
        )
        _say(one, label, said["loss"], entry["seconds"])


def _say(one: Plan, name: str, value: float | None, seconds: float) -> None:
    number = "no number" if value is None else f"{value:.4f}"
    print(display.printable(f"{one['name']}: {name} {number} ({seconds:.1f} s)"), flush=True)


def main() -> int:
    """Measure what a file says; at its `refusal` is left the sentence with which this ends, if with one."""
    end_with_parent()
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        run(plan)
    except PolycomError as error:
        write_text(Path(plan["refusal"]), str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
