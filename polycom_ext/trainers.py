"""The trainers that a run spec may name, the forms of token files and checkpoints, and where each lives.

Another package adds its own as entry points: NAME = "MODULE:CLASS" under `polycom_ext.trainers`, a class that
keeps the contract of `runs/adapter.py`, and NAME = "MODULE:OBJECT" under `polycom_ext.token_formats`, a
`TokenFormat` of `data/formats.py`, under `polycom_ext.checkpoints`, a `Form` of `checkpoints/forms.py`, or
under `polycom_ext.task_data`, a `TaskData` of `evaluation/data.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from polycom_ext.errors import PolycomError, did_you_mean

GROUP = "polycom_ext.trainers"
OURS = {
    "megatron": "polycom_ext.integrations.megatron.adapter:MegatronAdapter",
    "olmo": "polycom_ext.integrations.olmo.adapter:OLMoAdapter",
}
"""`trainer:` of a spec -> the class of its adapter, imported when a spec asks for it."""

FORMAT_GROUP = "polycom_ext.token_formats"
OUR_FORMATS = {
    "megatron": "polycom_ext.integrations.megatron.token_format:INDEXED",
    "olmo": "polycom_ext.integrations.olmo.token_format:FLAT",
}
"""`--format` of `polycom data prepare` -> the form of token files."""
DEFAULT_FORMAT = "megatron"

CHECKPOINT_GROUP = "polycom_ext.checkpoints"
OUR_CHECKPOINTS = {
    "megatron-2023": "polycom_ext.integrations.megatron.released:CHECKPOINTS",
    "megatron": "polycom_ext.integrations.megatron.conversion:CHECKPOINTS",
    "megatron-torch": "polycom_ext.integrations.megatron.conversion:BY_RANK",
    "olmo": "polycom_ext.integrations.olmo.conversion:CHECKPOINTS",
    "hf": "polycom_ext.integrations.huggingface.conversion:CHECKPOINTS",
}
"""Forms of checkpoints -> what reads or writes them; asked in this order what a folder holds."""

TASK_DATA_GROUP = "polycom_ext.task_data"
OUR_TASK_DATA = {"olmo": "polycom_ext.integrations.olmo.task_data:TASKS"}
"""`--data` of `polycom eval` -> the data of tasks that an upstream has brought onto this machine."""

MODELS = "polycom_ext.integrations.huggingface:register"
"""What lets transformers know our models, by our code instead of that beside their weights."""


def names() -> list[str]:
    """The trainers there are, ours first."""
    return list(_known(GROUP, OURS))


def find(name: str) -> Any:
    """The adapter of `trainer: NAME`; raises PolycomError where there is none that can be imported."""
    return _load("trainer", name, _known(GROUP, OURS))()


def format_names() -> list[str]:
    """The forms of token files there are, ours first."""
    return list(_known(FORMAT_GROUP, OUR_FORMATS))


def token_format(name: str) -> Any:
    """The form of token files of that name; raises PolycomError as `find`."""
    return _load("token format", name, _known(FORMAT_GROUP, OUR_FORMATS))


def checkpoint_forms() -> dict[str, Any]:
    """The forms of checkpoints there are by name, ours first."""
    known = _known(CHECKPOINT_GROUP, OUR_CHECKPOINTS)
    return {name: _load("form of checkpoints", name, known) for name in known}


def task_data_names() -> list[str]:
    """The data of tasks there are, ours first."""
    return list(_known(TASK_DATA_GROUP, OUR_TASK_DATA))


def task_data(name: str) -> Any:
    """The data of tasks of that name; raises PolycomError as `find`."""
    return _load("data of tasks", name, _known(TASK_DATA_GROUP, OUR_TASK_DATA))


def register_models() -> None:
    """Let transformers load our models by their names, without running code that lies beside weights."""
    EntryPoint("models", MODELS, "").load()()


def _known(group: str, ours: Mapping[str, str]) -> dict[str, EntryPoint]:
    first = {name: EntryPoint(name, value, group) for name, value in ours.items()}
    return {**first, **{one.name: one for one in entry_points(group=group) if one.name not in ours}}


def _load(what: str, name: str, known: Mapping[str, EntryPoint]) -> Any:
    if name not in known:
        raise PolycomError(f"unknown {what} {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    try:
        return known[name].load()
    except Exception as error:
        raise PolycomError(f"{what} {name!r} cannot be imported from {known[name].value}: {error}") from error
