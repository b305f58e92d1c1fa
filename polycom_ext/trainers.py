"""The trainers that a run spec may name, and where the adapter of each one lives.

Another package adds its own under the entry point `polycom_ext.trainers`, as NAME = "MODULE:CLASS"; what the
class must offer is `runs/adapter.py`'s contract.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from polycom_ext.errors import PolycomError, did_you_mean

GROUP = "polycom_ext.trainers"
OURS = {
    "megatron": "polycom_ext.integrations.megatron.adapter:MegatronAdapter",
    "olmo": "polycom_ext.integrations.olmo.adapter:OLMoAdapter",
}
"""`trainer:` of a spec -> the class of its adapter, imported when a spec asks for it."""


def names() -> list[str]:
    """The trainers there are, ours first."""
    return list(_known())


def find(name: str) -> Any:
    """The adapter of `trainer: NAME`; raises PolycomError for a name that has none."""
    known = _known()
    if name not in known:
        raise PolycomError(f"unknown trainer {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return known[name].load()()


def _known() -> dict[str, EntryPoint]:
    ours = {name: EntryPoint(name, value, GROUP) for name, value in OURS.items()}
    return {**ours, **{one.name: one for one in entry_points(group=GROUP) if one.name not in ours}}
