"""A YAML file with what it extends, and its fields checked: what run specs and site files share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from polycom_ext.errors import PolycomError, did_you_mean
from polycom_ext.runs import document


def read(
    path: Path, kind: str, overrides: Iterable[str] = (), found: Callable[[Path], Path] = lambda path: path
) -> dict[str, Any]:
    """The mapping in a file, over what it extends, and beneath `key.sub=value` overrides.

    Args:
        kind: what the file is, in the sentence of a PolycomError.
        found: where a file that another one extends is.

    Raises PolycomError for a missing or malformed file, a cycle, and a text that no file can hold.
    """
    try:
        mapping = _inherited(path, kind, found, ())
        for override in overrides:
            mapping = merge(mapping, nested(*parse_set(override)))
        _check_texts(mapping, str(path))
    except RecursionError:
        raise PolycomError(f"{kind} {path} is nested too deeply, or holds an anchor within itself") from None
    return mapping


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


def _inherited(
    path: Path, kind: str, found: Callable[[Path], Path], above: tuple[Path, ...]
) -> dict[str, Any]:
    resolved = path.resolve()
    by = f", which {above[-1]} extends," if above else ""
    if resolved in above:
        chain = " -> ".join(link.name for link in (*above[above.index(resolved) :], resolved))
        raise PolycomError(f"{path} extends itself: {chain}; remove one of these `extends:`")
    try:
        content = document.load(resolved.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PolycomError(f"{kind} {path}{by} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PolycomError(f"{kind} {path}{by} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise PolycomError(f"{kind} {path}{by} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise PolycomError(f"{kind} {path}{by} must be a mapping of keys to values")
    base = content.pop("extends", None)
    if base is None:
        return merge({}, content)
    if not _is_text(base) or "\0" in str(base):
        raise PolycomError(f"{path}: extends must be the name of one file, not {base!r}")
    return merge(_inherited(found(path.parent / str(base)), kind, found, (*above, resolved)), content)


def parse_set(override: str) -> tuple[str, Any]:
    """`key=value` -> the key and its value, read as YAML."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise PolycomError(f"--set {override!r} must have the form key=value or key.sub=value")
    if parts[0] == "extends":
        raise PolycomError("--set cannot change `extends`; give the other file as CONFIG")
    return key, _value("--set", override, text)


def _value(flag: str, given: str, text: str) -> Any:
    try:
        return document.load(text)
    except yaml.YAMLError as error:
        raise PolycomError(f"{flag} {given!r}: the value is not valid YAML: {_one_line(error)}") from None


def nested(key: str, value: Any) -> dict[str, Any]:
    """`a.b` and a value -> the mapping of mappings in which it stands there."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def parse_each(text: str) -> tuple[str, list[Any]]:
    """`key=a,b,c` -> the key and its values, each read as YAML."""
    key, equals, values = text.partition("=")
    if not equals or not all(key.split(".")) or not all(values.split(",")):
        raise PolycomError(f"--each {text!r} must have the form key=a,b,c")
    return key, [_value("--each", text, value) for value in values.split(",")]


def comparison(mapping: dict[str, Any], origin: str) -> dict[str, list[Any]]:
    """The section `each`: keys, as --set has them, and the values that they take in turn."""
    compared = section(mapping, "each", origin)
    for key, values in compared.items():
        if not isinstance(values, list) or not values or not all(_is_text(value) for value in values):
            raise PolycomError(f"{origin}: each.{key} must be a list of texts or numbers, not {values!r}")
    return dict(compared)


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


def check_keys(mapping: dict[str, Any], known: Sequence[str], origin: str) -> None:
    """Raise PolycomError for a key that nobody knows."""
    for key in mapping:
        if key not in known:
            raise PolycomError(
                f"{origin}: unknown key {key!r}{did_you_mean(str(key), known)}; known: {', '.join(known)}"
            )


def text(mapping: dict[str, Any], key: str, origin: str, what: str) -> str:
    """A text that has to be there; `what` says what it tells."""
    value = mapping.get(key)
    if value is None:
        raise PolycomError(f"{origin} has no `{key}:` ({what})")
    if not _is_text(value) or not str(value):
        raise PolycomError(f"{origin}: {key} must be a text ({what}), not {value!r}")
    return str(value)


def count(mapping: dict[str, Any], key: str, origin: str, default: int, least: int = 1) -> int:
    """An integer, at least `least`."""
    value = mapping.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PolycomError(f"{origin}: {key} must be an integer of at least {least}, not {value!r}")
    return int(value)


def texts(mapping: dict[str, Any], key: str, origin: str) -> tuple[str, ...]:
    """A list of texts, empty where it is not there."""
    value = mapping.get(key, [])
    if not isinstance(value, list) or not all(_is_text(one) and str(one) for one in value):
        raise PolycomError(f"{origin}: {key} must be a list of texts, not {value!r}")
    return tuple(map(str, value))


def section(mapping: dict[str, Any], key: str, origin: str) -> dict[str, Any]:
    """A mapping, empty where it is not there."""
    value = mapping.get(key, {})
    if not isinstance(value, dict):
        raise PolycomError(f"{origin}: {key} must be a mapping of names to values, not {value!r}")
    return value


def environment(mapping: dict[str, Any], origin: str) -> dict[str, str]:
    """The section of that name: variables and their values."""
    variables = section(mapping, "environment", origin)
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
