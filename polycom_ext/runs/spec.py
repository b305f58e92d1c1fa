"""A run spec: one YAML file, what it inherits, what the command line overrides, and what must hold of it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polycom_ext import activations, trainers
from polycom_ext.errors import PolycomError, did_you_mean
from polycom_ext.runs import fields

SHARED_KEYS = (
    *("name", "trainer", "upstream", "activation", "ffn_width", "nodes", "processes_per_node"),
    *("stop_grace_seconds", "keep_checkpoints", "environment", "sources", "rehearsal_of"),
)
"""Top-level keys of every spec; the one more is the section of the trainer's options."""


@dataclass(frozen=True)
class Spec:
    """A resolved spec: nothing inherited, nothing left to override."""

    name: str
    trainer: str
    activation: str
    """NAME or NAME-ORDER of the registry."""
    ffn_width: int | None
    """Width of the FFN if it is not gated; a gated activation gets `matched_ffn_width`."""
    processes_per_node: int
    environment: dict[str, str]
    options: dict[str, Any]
    """The trainer's section: upstream's own option names."""
    sources: Any = None
    """Where the numbers come from; read by people only."""
    upstream: str | None = None
    """The pinned version of the trainer; None where there is but one, or none."""
    nodes: int = 1
    stop_grace_seconds: int = 600
    """How long it may take to save a checkpoint and to end, once it was told to stop."""
    keep_checkpoints: int | None = None
    """So many steps' whole checkpoints are kept, the newest; None for all."""
    rehearsal_of: str | None = None
    """Name of the run that this one rehearses in small; None for a run of its own."""

    @property
    def world_size(self) -> int:
        """Processes on all nodes together."""
        return self.nodes * self.processes_per_node

    @property
    def entry(self) -> activations.Activation:
        """The activation's entry in the registry."""
        return activations.parse(self.activation)[0]

    @property
    def matched_ffn_width(self) -> int | None:
        """FFN width at equal parameters: `ffn_width`, or 2/3 of it for a gated activation (paper, section 4).

        Raises PolycomError if 3 does not divide 2 * ffn_width.
        """
        if self.ffn_width is None or not self.entry.gated:
            return self.ffn_width
        width, rest = divmod(2 * self.ffn_width, 3)
        if rest:
            raise PolycomError(
                f"{self.name}: ffn_width {self.ffn_width} has no exact 2/3, which the gated activation "
                f"{self.activation!r} needs; take a multiple of 3"
            )
        return width

    def as_mapping(self) -> dict[str, Any]:
        """The mapping that `from_mapping` reads back to an equal spec, also from a file."""
        mapping: dict[str, Any] = {
            "name": self.name,
            "trainer": self.trainer,
            "upstream": self.upstream,
            "activation": self.activation,
            "ffn_width": self.ffn_width,
            "nodes": self.nodes,
            "processes_per_node": self.processes_per_node,
            "stop_grace_seconds": self.stop_grace_seconds,
            "keep_checkpoints": self.keep_checkpoints,
            "environment": self.environment,
            trainers.find(self.trainer).section: self.options,
            "sources": self.sources,
            "rehearsal_of": self.rehearsal_of,
        }
        return {key: value for key, value in mapping.items() if value is not None}


def load(path: Path, overrides: Iterable[str] = ()) -> Spec:
    """Read a spec with everything it extends, apply `key.sub=value` overrides, check keys and types.

    Raises PolycomError for a missing or malformed file, a cycle, an unknown key or a value of the wrong type,
    and for a comparison, which is several runs.
    """
    return the_one(path, load_each(path, overrides))


def the_one(path: Path, specs: list[Spec]) -> Spec:
    """The run of a file that is to be of one; raises PolycomError for a comparison."""
    if len(specs) > 1:
        names = ", ".join(spec.name for spec in specs)
        raise PolycomError(f"{path} is a comparison of {names}: choose one by --set, as in activation=NAME")
    return specs[0]


def load_each(path: Path, overrides: Iterable[str] = (), each: Iterable[str] = ()) -> list[Spec]:
    """The runs of a comparison: a spec for each value of the keys under `each:`, NAME-VALUE.

    Args:
        overrides: as `load` has them; of a key that is compared the one value to take.
        each: `key=a,b,c`, in place of what the file compares.
    """
    return [
        from_mapping(changed(mapping, changes), str(path))
        for mapping, changes in choices(path, overrides, each)
    ]


Change = tuple[str, Any]
"""A key, as --set has it, and its value; None deletes."""


def choices(
    path: Path, overrides: Iterable[str] = (), each: Iterable[str] = ()
) -> Iterator[tuple[dict[str, Any], list[Change]]]:
    """For each run of a comparison what stands in the files, and the changes that make the run of it."""
    overrides, given = list(overrides), dict(map(fields.parse_each, each))
    mapping = fields.read(path, "run spec", overrides)
    mapping.setdefault("name", path.stem)
    name = fields.text(mapping, "name", str(path), "the name of the run")
    compared = given or fields.comparison(mapping, str(path))
    changes = list(map(fields.parse_set, overrides))
    for key, value in changes:  # as its name says, whether it is one of several or alone
        if key in compared:
            compared[key] = [value]
    for values in itertools.product(*compared.values()):
        named: Change = ("name", "-".join([name, *map(str, values)]))
        yield fields.read(path, "run spec"), [*changes, *zip(compared, values, strict=True), named]


def changed(mapping: dict[str, Any], changes: Iterable[Change]) -> dict[str, Any]:
    """The mapping of one run, with the changes in their order."""
    for key, value in changes:
        mapping = fields.merge(mapping, fields.nested(key, value))
    return {key: value for key, value in mapping.items() if key != "each"}


def from_mapping(mapping: dict[str, Any], origin: str) -> Spec:
    """Check the keys and types of a resolved mapping; `origin` names it in the sentence of a PolycomError."""
    trainer = fields.text(mapping, "trainer", origin, f"one of {', '.join(trainers.names())}")
    try:
        adapter = trainers.find(trainer)
    except PolycomError as error:
        raise PolycomError(f"{origin}: {error}") from None
    fields.check_keys(mapping, (*SHARED_KEYS, adapter.section), origin)
    name = fields.text(mapping, "name", origin, "the name of the run")
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
        raise PolycomError(
            f"{origin}: name {name!r} must be a plain folder name: letters, digits, '_', '.', '+', '-'"
        )
    activation = fields.text(mapping, "activation", origin, f"one of {', '.join(activations.names())}")
    try:
        activations.parse(activation)
    except PolycomError as error:
        raise PolycomError(f"{origin}: {error}") from None
    spec = Spec(
        name=name,
        trainer=trainer,
        activation=activation,
        ffn_width=fields.count(mapping, "ffn_width", origin, 1) if "ffn_width" in mapping else None,
        nodes=fields.count(mapping, "nodes", origin, 1),
        processes_per_node=fields.count(mapping, "processes_per_node", origin, 1),
        stop_grace_seconds=fields.count(mapping, "stop_grace_seconds", origin, 600),
        keep_checkpoints=fields.count(mapping, "keep_checkpoints", origin, 1)
        if "keep_checkpoints" in mapping
        else None,
        environment=fields.environment(mapping, origin),
        options=fields.section(mapping, adapter.section, origin),
        sources=mapping.get("sources"),
        upstream=_upstream(mapping, adapter, origin),
        rehearsal_of=fields.text(mapping, "rehearsal_of", origin, "the run that it rehearses")
        if "rehearsal_of" in mapping
        else None,
    )
    _ = spec.matched_ffn_width
    return spec


def _upstream(mapping: dict[str, Any], adapter: Any, origin: str) -> str | None:
    versions = list(adapter.upstreams)
    if mapping.get("upstream") is None:
        return versions[0] if len(versions) > 1 else None
    name = fields.text(mapping, "upstream", origin, "a pinned version of the trainer")
    if name not in versions:
        near = did_you_mean(name, versions)
        raise PolycomError(
            f"{origin}: trainer {adapter.name} has no upstream {name!r}{near}; known: {', '.join(versions)}"
        )
    return name
