"""lm-eval, as `polycom eval` calls it: task by task, with data from the hub or from here."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from polycom_ext import trainers
from polycom_ext.errors import MissingDependencyError, PolycomError, did_you_mean
from polycom_ext.evaluation.data import HUB, TaskData
from polycom_ext.upstream.download import cache_dir, make_folder

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

NEEDS = ("lm_eval", "accelerate", "transformers")
PLACES = {
    **{
        name: name
        for name in ("hellaswag", "piqa", "sciq", "winogrande", "coqa", "commonsense_qa", "openbookqa")
    },
    **{"arc_easy": "arc", "arc_challenge": "arc", "social_iqa": "siqa"},
    **{"boolq": "super_glue/boolq", "copa": "super_glue/copa", "mmlu": "mmlu/default"},
}
"""The paper's tasks -> their folders among lm-eval's, whose 14000 tasks take half a minute to read."""


def check() -> None:
    """Raise MissingDependencyError, with the way out, where lm-eval or what its backend needs is missing."""
    for name in NEEDS:
        if find_spec(name) is None:
            raise MissingDependencyError(f"an evaluation needs {name}: pip install 'polycom-ext[eval]'")


def environment(offline: bool) -> dict[str, str]:
    """What libraries read when they are imported; they call nobody where all is here."""
    apart = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if offline else {}
    return {"TOKENIZERS_PARALLELISM": "false", **apart}


def local_tasks(name: str) -> Path:
    """The folder of task files, for lm-eval's `--include_path` too, that read data of `--data NAME`.

    They are made once for a version of lm-eval and of the data, in the cache.
    """
    data: TaskData = trainers.task_data(name)
    lm_eval, of = _folder(), data.version()
    key = hashlib.sha256(
        f"{version('lm_eval')}\n{lm_eval}\n{of}\n{Path(__file__).read_text()}".encode()
    ).hexdigest()
    folder = make_folder(cache_dir() / "tasks") / f"{name}-{key[:12]}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        originals = _originals(lm_eval)
        for task, changes in data.write(made).items():
            text = yaml.safe_dump(
                {"include": str(originals[task]), **_absolute(changes, folder)}, sort_keys=False
            )
            (made / f"{task}.yaml").write_text(text, encoding="utf-8")
        try:
            made.rename(folder)
        except OSError:  # another process was quicker
            shutil.rmtree(made)
    return folder


def manager(tasks: Sequence[str], include: Sequence[Path]) -> TaskManager:
    """lm-eval's index of what is asked for; its whole index only where that is none of the paper's tasks."""
    from lm_eval.tasks import TaskManager

    own = [_folder() / PLACES[name] for name in tasks if name in PLACES]
    known = TaskManager(include_defaults=False, include_path=[*dict.fromkeys(own), *include])
    if all(name in known.task_index for name in tasks):
        return known
    return TaskManager(include_path=list(include))


def leaves(name: str, index: Mapping[str, Any]) -> list[str]:
    """The single tasks of a task, a group or a tag of lm-eval's. Raises PolycomError for none of them."""
    if name not in index:
        raise PolycomError(f"lm-eval {version('lm_eval')} has no task {name!r}{did_you_mean(name, index)}")
    entry = index[name]
    below = entry.tags if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
    if not isinstance(below, list | set | tuple):
        return [name]
    named = [
        one if isinstance(one, str) else one.get("task") or one.get("group") for one in sorted(below, key=str)
    ]
    return [leaf for one in named for leaf in leaves(one, index)]


def check_covered(tasks: Sequence[str], known: TaskManager, own: Sequence[Path], data: str) -> None:
    """Raise PolycomError for a task with data neither in a folder of `local_tasks` nor of the user's."""
    folders = [folder.resolve() for folder in own]
    for name in tasks:
        for leaf in leaves(name, known.task_index):
            file = known.task_index[leaf].yaml_path
            if file is None or not any(folder in file.resolve().parents for folder in folders):
                raise PolycomError(
                    f"--data {data} has nothing for task {leaf}: leave it out, or load its data from the hub "
                    f"(--data {HUB})"
                )


def load(name: str, known: TaskManager, data: str) -> list[Any]:
    """A task or group with its data. Raises PolycomError where those cannot be had."""
    leaves(name, known.task_index)
    try:
        loaded = known.load([name])
    except Exception as error:  # datasets, the hub's client and its transport each have their own
        raise PolycomError(_missing(name, known, data, error)) from error
    group = loaded.get("groups", {}).get(name)
    return list(loaded["tasks"].values()) if group is None else [group]


def evaluate(
    lm: Any, objects: list[Any], known: TaskManager, limit: int | None, shots: int | None
) -> dict[str, Any]:
    """What lm-eval says of a task or group that was loaded: on rank 0, on others nothing."""
    from lm_eval import evaluator

    evaluator.get_git_commit_hash = lambda: None  # it would ask git about the user's folder, aloud
    said = evaluator.simple_evaluate(
        lm, tasks=objects, task_manager=known, limit=limit, num_fewshot=shots, log_samples=False
    )
    if said is None:
        return {}
    keys = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
    kept = {key: said[key] for key in keys if key in said}
    made: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return made


def model(folder: Path, plan: Mapping[str, Any]) -> Any:
    """lm-eval's model of a folder, on as many processes as torchrun has started; as `worker.Plan` says."""
    import torch
    from lm_eval.models.huggingface import HFLM

    try:
        lm = HFLM(
            str(folder),
            device="cuda" if torch.cuda.is_available() else "cpu",
            backend="causal",
            **{name: plan[name] for name in ("batch_size", "max_length", "trust_remote_code")},
        )
    except Exception as error:  # transformers' and its parts' are of all kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PolycomError(f"{folder} cannot be loaded as a model with its tokenizer: {reason}") from error
    if lm.eot_token_id is None:
        raise PolycomError(f"{folder} names no eos_token in its tokenizer_config.json, which lm-eval needs")
    accelerator = getattr(lm, "accelerator", None)
    if accelerator is not None and lm.world_size == 1:  # lm-eval divides requests among GPUs only
        lm._rank, lm._world_size = accelerator.process_index, accelerator.num_processes
    return lm


def _folder() -> Path:
    found = find_spec("lm_eval")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "tasks"


def _originals(tasks: Path) -> dict[str, Path]:
    """Task -> lm-eval's own file of it, of the paper's tasks."""
    from lm_eval.tasks import TaskManager

    places = [tasks / place for place in dict.fromkeys(PLACES.values())]
    index = TaskManager(include_defaults=False, include_path=places).task_index
    return {name: entry.yaml_path for name, entry in index.items() if entry.yaml_path is not None}


def _absolute(changes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    files = changes["dataset_kwargs"]["data_files"]
    return {
        **changes,
        "dataset_kwargs": {"data_files": {split: str(folder / one) for split, one in files.items()}},
    }


def _missing(name: str, known: TaskManager, data: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if data != HUB:
        return f"the data of task {name} cannot be read: {reason}"
    sets = {
        (known.task_index[leaf].cfg or {}).get("dataset_path")
        for leaf in leaves(name, known.task_index)
        if known.task_index[leaf].cfg
    }
    where = " ".join(sorted(filter(None, sets))) or "its data set"
    here = " or ".join(f"--data {one}" for one in trainers.task_data_names())
    return (
        f"the data of task {name} ({where}) cannot be had from the hub ({reason}): load them where it is "
        f"reached, with `hf download --repo-type dataset {where}`, into the same HF_HOME; or take data that "
        f"lie here: {here}"
    )
