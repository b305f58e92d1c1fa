"""A run spec: one YAML file, what it inherits, what the command line overrides, and what must hold of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from polycom_ext import activations
from polycom_ext.errors import PolycomError
from polycom_ext.runs.suggest import did_you_mean

SHARED_KEYS = ("name", "trainer", "activation", "ffn_width", "processes", "environment", "sources")
"""Top-level keys of every spec; the one more is the trainer's section, named after the trainer."""


class _Loader(yaml.SafeLoader):
    """YAML with two traps of version 1.1 closed: `2e-3` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(scalars):
            if any(key.value == earlier.value for earlier in scalars[:i]):
                problem = f"key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class Spec:
    """A resolved spec: nothing inherited, nothing left to override."""

    name: str
    trainer: str
    activation: str
    """NAME or NAME-ORDER of the registry."""
    ffn_width: int | None
    """Width of the FFN if it is not gated; a gated activation gets `matched_ffn_width`."""
    processes: int
    environment: dict[str, str]
    options: dict[str, Any]
    """The trainer's section: upstream's own option names."""
    sources: Any = None
    """Where the numbers come from; read by people only."""

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
        """The mapping that `from_mapping` reads back to an equal spec."""
        mapping: dict[str, Any] = {
            "name": self.name,
            "trainer": self.trainer,
            "activation": self.activation,
            "ffn_width": self.ffn_width,
            "processes": self.processes,
            "environment": self.environment,
            self.trainer: self.options,
            "sources": self.sources,
        }
        return {key: value for key, value in mapping.items() if value is not None}


def load(path: Path, overrides: Iterable[str] = ()) -> Spec:
    """Read a spec with everything it extends, apply `key.sub=value` overrides, check keys and types.

    Raises PolycomError for a missing or malformed file, a cycle, an unknown key or a value of the wrong type.
    """
    mapping = _inherit(path, ())
    for override in overrides:
        mapping = merge(mapping, _parse_override(override))
    mapping.setdefault("name", path.stem)
    return from_mapping(mapping, str(path))


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
    trainer = _text(mapping, "trainer", origin, "megatron or olmo")
    known = (*SHARED_KEYS, trainer)
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
    activation = _text(mapping, "activation", origin, f"one of {', '.join(activations.REGISTRY)}")
    try:
        activations.parse(activation)
    except PolycomError as error:
        raise PolycomError(f"{origin}: {error}") from None
    options = _section(mapping, trainer, origin)
    for key in options:
        if not isinstance(key, str):
            raise PolycomError(f"{origin}: {trainer}.{key} must be a name, so quote it")
    spec = Spec(
        name=name,
        trainer=trainer,
        activation=activation,
        ffn_width=_count(mapping, "ffn_width", origin) if "ffn_width" in mapping else None,
        processes=_count(mapping, "processes", origin) if "processes" in mapping else 1,
        environment=_environment(mapping, origin),
        options=options,
        sources=mapping.get("sources"),
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
        content = yaml.load(resolved.read_text(encoding="utf-8"), Loader=_Loader)
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
    if not isinstance(base, str):
        raise PolycomError(f"{path}: extends must be the name of one file, not {base!r}")
    return merge(_inherit(path.parent / base, (*above, resolved)), content)


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise PolycomError(f"--set {override!r} must have the form key=value or key.sub=value")
    if parts[0] == "extends":
        raise PolycomError("--set cannot change `extends`; give the other file as CONFIG")
    try:
        value: Any = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise PolycomError(f"--set {override!r}: the value is not valid YAML: {_one_line(error)}") from None
    for part in reversed(parts):
        value = {part: value}
    return dict(value)


def _one_line(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


def _text(mapping: dict[str, Any], key: str, origin: str, what: str) -> str:
    value = mapping.get(key)
    if value is None:
        raise PolycomError(f"{origin} has no `{key}:` ({what})")
    if not isinstance(value, str) or not value:
        raise PolycomError(f"{origin}: {key} must be a text ({what}), not {value!r}")
    return value


def _count(mapping: dict[str, Any], key: str, origin: str) -> int:
    value = mapping[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PolycomError(f"{origin}: {key} must be an integer of at least 1, not {value!r}")
    return value


def _section(mapping: dict[str, Any], key: str, origin: str) -> dict[str, Any]:
    value = mapping.get(key, {})
    if not isinstance(value, dict):
        raise PolycomError(f"{origin}: {key} must be a mapping of names to values, not {value!r}")
    return value


def _environment(mapping: dict[str, Any], origin: str) -> dict[str, str]:
    variables = _section(mapping, "environment", origin)
    for name, value in variables.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise PolycomError(
                f"{origin}: environment.{name} must be a text or a number, not {value!r}: quote it"
            )
    return {str(name): str(value) for name, value in variables.items()}
