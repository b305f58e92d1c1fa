"""Which layouts fit on a device: the smallest one, and those of the same training on more and on fewer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from polycom_ext.errors import PolycomError
from polycom_ext.planning.plan import Plan, plan
from polycom_ext.runs import fields
from polycom_ext.runs.adapter import Adapter, find
from polycom_ext.runs.layout import of
from polycom_ext.runs.spec import Spec

MOST = 1024
"""GPUs of the largest cluster that is planned for."""


@dataclass(frozen=True)
class Choice:
    """A layout of a run, and the values of --set that ask for it."""

    changes: tuple[str, ...]
    plan: Plan


def changed(adapter: Adapter, spec: Spec, changes: Sequence[str]) -> Spec:
    """The spec with these values of --set, which are of the trainer's own section."""
    section = adapter.section
    mapping = {section: spec.options}
    for text in changes:
        mapping = fields.merge(mapping, fields.nested(*fields.parse_set(text)))
    return replace(spec, options=mapping[section])


def smallest(spec: Spec, limit: float, adapter: Adapter | None = None) -> Choice | None:
    """The first of the trainer's alternatives whose fullest rank holds no more than `limit` bytes."""
    adapter = adapter or find(spec.trainer)  # which takes longer than to plan
    for changes in of(adapter, spec).alternatives(spec):
        try:
            planned = plan(changed(adapter, spec, changes), adapter)
        except PolycomError:
            continue
        if planned.bytes <= limit:
            return Choice(changes, planned)
    return None


def worlds(spec: Spec) -> list[int]:
    """Numbers of nodes: doubled from one up to MOST devices, and the spec's own."""
    most = MOST // spec.processes_per_node
    return sorted({spec.nodes, *(1 << n for n in range(most.bit_length()) if 1 << n <= most)})


def scaling(spec: Spec, limit: float) -> Iterator[tuple[int, Choice | None]]:
    """(devices, the spec's own layout on so many, or else the smallest that fits there) for each of `worlds`.

    The global batch stays: more devices share it, until there is nothing left to share.
    """
    adapter = find(spec.trainer)
    for nodes in worlds(spec):
        there = replace(spec, nodes=nodes)
        found = None
        try:
            planned = plan(there, adapter)
            if planned.bytes <= limit:
                found = Choice((), planned)
        except PolycomError:
            pass
        try:
            found = found or smallest(there, limit, adapter)
        except PolycomError:
            found = None
        yield there.world_size, found
