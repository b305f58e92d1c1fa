"""A run spec: one YAML file, what it inherits, what the command line overrides, and what must hold of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from polycom_ext import activations, trainers
from polycom_ext.errors import PolycomError, did_you_mean
from polycom_ext.runs import document

SHARED_KEYS = (
    *("name", "trainer", "upstream", "activation", "ffn_width", "nodes", "processes_per_node"),
    *("environment", "sources"),
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
            "environment": self.environment,
            trainers.find(self.trainer).section: self.options,
            "sources": self.sources,
        }
        return {key: value for key, value in mapping.items() if value is not None}


def load(path: Path, overrides: Iterable[str] = ()) -> Spec:
    """Read a spec with everything it extends, apply `key.sub=value` overrides, check keys and types.

    Raises PolycomError for a missing or malformed file, a cycle, an unknown key or a value of the wrong type.
    """
    try:
        mapping = _inherit(path, ())
        for override in overrides:
            mapping = merge(mapping, _parse_override(override))
        mapping.setdefault("name", path.stem)
        return from_mapping(mapping, str(path))
    except RecursionError:
        raise PolycomError(
            f"run spec {path} is nested too deeply, or holds an anchor within itself"
        ) from None


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """base with changes: mappings merge key by key, null deletes, everything else replaces."""
    merged = dict(base)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            below = merged.get(key)
            merged[key] = merge(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def from_mapping(mapping: dict[str, Any], origin: str) -> Spec:
    """Check the keys and types of a resolved mapping; `origin` names it in the sentence of a PolycomError."""
    _check_texts(mapping, origin)
    trainer = _text(mapping, "trainer", origin, f"one of {', '.join(trainers.names())}")
    try:
        adapter = trainers.find(trainer)
    except PolycomError as error:
        raise PolycomError(f"{origin}: {error}") from None
    known = (*SHARED_KEYS, adapter.section)
    for key in mapping:
        if key not in known:
            raise PolycomError(
                f"{origin}: unknown key {key!r}{did_you_mean(str(key), known)}; known: {', '.join(known)}"
            )
    name = _text(mapping, "name", origin, "the name of the run")
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
        raise PolycomError(
            f"{origin}: name {name!r} must be a plain folder name: letters, digits, '_', '.', '+', '-'"
        )
    activation = _text(mapping, "activation", origin, f"one of {', '.join(activations.names())}")
    try:
        activations.parse(activation)
    except PolycomError as error:
        raise PolycomError(f"{origin}: {error}") from None
    spec = Spec(
        name=name,
        trainer=trainer,
        activation=activation,
        ffn_width=_count(mapping, "ffn_width", origin, 1) if "ffn_width" in mapping else None,
        nodes=_count(mapping, "nodes", origin, 1),
        processes_per_node=_count(mapping, "processes_per_node", origin, 1),
        environment=_environment(mapping, origin),
        options=_section(mapping, adapter.section, origin),
        sources=mapping.get("sources"),
        upstream=_upstream(mapping, adapter, origin),
    )
    _ = spec.matched_ffn_width
    return spec


def _inherit(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    by = f", which {above[-1]} extends," if above else ""
    if resolved in above:
        chain = " -> ".join(link.name for link in (*above[above.index(resolved) :], resolved))
        raise PolycomError(f"{path} extends itself: {chain}; remove one of these `extends:`")
    try:
        content = document.load(resolved.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PolycomError(f"run spec {path}{by} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PolycomError(f"run spec {path}{by} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise PolycomError(f"run spec {path}{by} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise PolycomError(f"run spec {path}{by} must be a mapping of keys to values")
    base = content.pop("extends", None)
    if base is None:
        return merge({}, content)
    if not _is_text(base) or "\0" in str(base):
        raise PolycomError(f"{path}: extends must be the name of one file, not {base!r}")
    return merge(_inherit(path.parent / str(base), (*above, resolved)), content)


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise PolycomError(f"--set {override!r} must have the form key=value or key.sub=value")
    if parts[0] == "extends":
        raise PolycomError("--set cannot change `extends`; give the other file as CONFIG")
    try:
        value: Any = document.load(text)
    except yaml.YAMLError as error:
        raise PolycomError(f"--set {override!r}: the value is not valid YAML: {_one_line(error)}") from None
    for part in reversed(parts):
        value = {part: value}
    return dict(value)


def _one_line(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


def _check_texts(value: Any, origin: str, key: str = "") -> None:
    """Refuse what neither a command line nor a file can hold; only an escape in quotes can write it."""
    if isinstance(value, str):
        if "\0" in value or not _is_unicode(value):
            where = f"{key} holds {value!r}" if key else f"{value!r} is a key"
            raise PolycomError(f"{origin}: {where}, a character that no file or command line can hold")
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_texts(name, origin)
            _check_texts(inner, origin, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            _check_texts(inner, origin, key)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # one half of a surrogate pair
        return False
    return True


def _is_text(value: Any) -> bool:
    """Whether a scalar has a text as written: what reads as a number has, too."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _text(mapping: dict[str, Any], key: str, origin: str, what: str) -> str:
    value = mapping.get(key)
    if value is None:
        raise PolycomError(f"{origin} has no `{key}:` ({what})")
    if not _is_text(value) or not str(value):
        raise PolycomError(f"{origin}: {key} must be a text ({what}), not {value!r}")
    return str(value)


def _count(mapping: dict[str, Any], key: str, origin: str, default: int) -> int:
    value = mapping.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PolycomError(f"{origin}: {key} must be an integer of at least 1, not {value!r}")
    return int(value)


def _section(mapping: dict[str, Any], key: str, origin: str) -> dict[str, Any]:
    value = mapping.get(key, {})
    if not isinstance(value, dict):
        raise PolycomError(f"{origin}: {key} must be a mapping of names to values, not {value!r}")
    return value


def _upstream(mapping: dict[str, Any], adapter: Any, origin: str) -> str | None:
    versions = list(adapter.upstreams)
    if mapping.get("upstream") is None:
        return versions[0] if len(versions) > 1 else None
    name = _text(mapping, "upstream", origin, "a pinned version of the trainer")
    if name not in versions:
        near = did_you_mean(name, versions)
        raise PolycomError(
            f"{origin}: trainer {adapter.name} has no upstream {name!r}{near}; known: {', '.join(versions)}"
        )
    return name


def _environment(mapping: dict[str, Any], origin: str) -> dict[str, str]:
    variables = _section(mapping, "environment", origin)
    for name, value in variables.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise PolycomError(
                f"{origin}: environment: {name!r} is no name of a variable: letters, digits and '_'"
            )
        if not _is_text(value):
            raise PolycomError(
                f"{origin}: environment.{name} must be a text or a number, not {value!r}: quote it"
            )
    return {name: str(value) for name, value in variables.items()}
