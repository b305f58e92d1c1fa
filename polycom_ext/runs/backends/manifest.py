"""Templates of YAML in `launch/`, filled in as data: no value can become anything but the value it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import yaml

from polycom_ext import shipped
from polycom_ext.runs import document


def render(names: Iterable[str], values: Mapping[str, Any]) -> str:
    """The templates as one text of several documents."""
    return "---\n".join(dump(fill(template(name), values)) for name in names)


@cache
def template(name: str) -> Any:
    """What stands in a template, read as YAML; not to be changed."""
    return document.load((shipped.folder("launch") / name).read_text(encoding="utf-8"))


def fill(part: Any, values: Mapping[str, Any]) -> Any:
    """The template with each `$word` replaced by its value.

    One that is None goes, and what it leaves empty. In a list, a value that is a list gives its items.
    """
    if isinstance(part, str) and part.startswith("$"):
        return values[part[1:]]
    if isinstance(part, dict):
        filled = {key: fill(value, values) for key, value in part.items()}
        return {
            key: value
            for key, value in filled.items()
            if value is not None and (value != {} or part[key] == {})
        }
    if isinstance(part, list):
        items: list[Any] = []
        for one in part:
            value = fill(one, values)
            items += value if isinstance(value, list) else [value]
        return items
    return part


def dump(value: Any) -> str:
    """YAML of which every reader, of any version, reads a text as that text."""
    return yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=float("inf"),
        default_flow_style=False,
    )


_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")


class _Dumper(yaml.SafeDumper):
    """`kubectl` reads YAML 1.1 as Go knows it: `y` and `0o17` are no texts to it, unless they are quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # a pod that stands in a manifest twice is written twice

    def _text(self, value: str) -> yaml.Node:
        plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*", value) and value.lower() not in _WORDS
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(str, _Dumper._text)
