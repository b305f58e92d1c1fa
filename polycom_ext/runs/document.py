"""YAML in which a scalar is what a person wrote: YAML 1.2's core schema, and the text of each number kept.

YAML 1.1 reads `010` as 8, `1:30` as 90, `no` as false and `2026-01-01` as a date. Here a number is decimal,
`true`, `false` and `null` (`~`, or nothing) are the only words of YAML's own, and everything else is a text.
A number remembers its text, for readers that want one: a file name `010`, a version `1.10`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

_CORE = {
    "null": (re.compile(r"(~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    "int": (re.compile(r"[-+]?[0-9]+(_[0-9]+)*\Z"), list("-+0123456789")),
    "float": (
        re.compile(
            r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"
        ),
        list("-+.0123456789"),
    ),
    "merge": (re.compile(r"<<\Z"), ["<"]),
}
"""Tag -> what a plain scalar of it looks like, and its first characters. `<<` merges, as before 1.2."""


class _Written:
    """A number whose `str` is the text it was read from, where Python would print another."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __getnewargs__(self) -> tuple[Any]:
        return (self.text,)

    __repr__ = __str__


class Int(_Written, int):
    """Such as `010`."""

    def __new__(cls, text: str) -> Int:
        number = super().__new__(cls, text)
        number.text = text
        return number


class Float(_Written, float):
    """Such as `1.10`."""

    def __new__(cls, text: str) -> Float:
        number = super().__new__(cls, re.sub(r"\.(inf|nan)", r"\1", text.lower()))
        number.text = text
        return number


def load(text: str) -> Any:
    """The one document in a text. Raises yaml.YAMLError, also for a key that is given twice."""
    return yaml.load(text, Loader=_Loader)


def dump(value: Any) -> str:
    """YAML that `load` reads back to an equal value, in which every number has its text again."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def flat(mapping: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """One mapping of all in it that is no mapping, its keys joined."""
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        found |= flat(value, separator, f"{name}{separator}") if isinstance(value, Mapping) else {name: value}
    return found


def holds(number: float, text: str) -> bool:
    """Whether a number is what its text says: 12e4567 is more than every float, and 1e-400 is not 0."""
    too_large = math.isinf(number) and "inf" not in text.lower()
    too_small = number == 0 and re.match(r"[-+0._]*[1-9]", text)
    return not (too_large or too_small)


def is_beyond(text: str) -> bool:
    """Whether a text is a number that no float holds."""
    return _CORE["float"][0].match(text) is not None and not holds(Float(text), text)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Keys are texts as written; one that is given twice is an error."""
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(scalars):
            if any(key.value == earlier.value for earlier in scalars[:i]):
                raise _Error(None, None, f"key {key.value!r} is given twice", key.start_mark)
        self.flatten_mapping(node)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = _tag("str")
        return super().construct_mapping(node, deep)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind = node.tag.rpartition(":")[2]
        text = str(self.construct_scalar(node))
        if not _CORE[kind][0].match(text):  # a tag asks for what the text is not, as in `!!int 0x1F`
            raise _Error(None, None, f"{text!r} is not of type {kind}", node.start_mark)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        return _integer(text) if kind == "int" else _number(text)

    def _word(self, node: yaml.ScalarNode) -> str:
        return str(node.value)

    def _unknown(self, node: yaml.Node) -> None:
        raise _Error(None, None, f"a spec has nothing of type {node.tag!r}", node.start_mark)


def _integer(text: str) -> int | str:
    try:
        number = Int(text)
    except ValueError:  # more digits than Python reads
        return text
    return int(number) if repr(int(number)) == text else number


def _number(text: str) -> float | str:
    number = Float(text)
    if not holds(number, text):  # then what was written can only be a text, as a commit is, 12e4567
        return text
    return float(number) if repr(float(number)) == text else number


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of either version would take for something else."""

    def _number(self, value: float) -> yaml.Node:
        kind = "int" if isinstance(value, int) else "float"
        if isinstance(value, float) and not isinstance(value, Float) and not math.isfinite(value):
            return self.represent_float(value)
        return self.represent_scalar(_tag(kind), str(value))

    def _text(self, value: str) -> yaml.Node:
        # Unescaped, a break of Unicode's own would be read as a space.
        style = '"' if re.search("[\x85\u2028\u2029]", value) else None
        return self.represent_scalar(_tag("str"), value, style=style)


_Error = yaml.constructor.ConstructorError


def _tag(name: str) -> str:
    return f"tag:yaml.org,2002:{name}"


_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {}
for _name, (_pattern, _first) in _CORE.items():
    _Loader.add_implicit_resolver(_tag(_name), _pattern, _first)
_Dumper.yaml_implicit_resolvers = {  # before 1.1's, by which 010 is octal
    first: [
        *_Loader.yaml_implicit_resolvers.get(first, ()),
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()),
    ]
    for first in {*_Loader.yaml_implicit_resolvers, *yaml.SafeDumper.yaml_implicit_resolvers}
}
for _name in ("null", "bool", "int", "float"):
    _Loader.add_constructor(_tag(_name), _Loader._scalar)
for _name in ("str", "seq", "map"):
    _Loader.add_constructor(_tag(_name), yaml.SafeLoader.yaml_constructors[_tag(_name)])
_Loader.add_constructor(_tag("merge"), _Loader._word)  # anywhere but as a key
_Loader.add_constructor(None, _Loader._unknown)
_Dumper.add_representer(str, _Dumper._text)
yaml.SafeDumper.add_representer(Int, lambda dumper, value: dumper.represent_int(int(value)))
yaml.SafeDumper.add_representer(Float, lambda dumper, value: dumper.represent_float(float(value)))
for _type in (int, Int, float, Float):
    _Dumper.add_representer(_type, _Dumper._number)
