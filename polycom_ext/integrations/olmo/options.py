"""The options of an OLMo, patched or not, read from the dataclasses of its config.py without running it."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path


@lru_cache
def known(tree: Path) -> set[str]:
    """The names of TrainConfig's fields, and `section.field` for those that are dataclasses themselves."""
    classes = _classes(tree)
    names = set()
    for name, annotation in classes["TrainConfig"].items():
        names.add(name)
        section = re.sub(r"Optional\[(\w+)\]", r"\1", annotation)
        names.update(f"{name}.{field}" for field in classes.get(section, ()))
    return names


@lru_cache
def texts(tree: Path) -> set[str]:
    """The names of fields that hold texts, lists or mappings of them, in whatever section they are."""
    annotations: dict[str, set[str]] = {}
    for fields in _classes(tree).values():
        for name, annotation in fields.items():
            annotations.setdefault(name, set()).update(re.findall(r"\w+", annotation))
    return {name for name, types in annotations.items() if "str" in types and types <= _OF_TEXTS}


@lru_cache
def model_defaults(tree: Path) -> dict[str, int]:
    """Field of ModelConfig -> default, of those that are integers."""
    [config] = [node for node in _parsed(tree) if node.name == "ModelConfig"]
    return {
        statement.target.id: statement.value.value
        for statement in config.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(statement.value, ast.Constant)
        and type(statement.value.value) is int
    }


_OF_TEXTS = {"str", "Optional", "List", "Dict", "Tuple"}


def _classes(tree: Path) -> dict[str, dict[str, str]]:
    return {node.name: _fields(node) for node in _parsed(tree)}


def _parsed(tree: Path) -> list[ast.ClassDef]:
    source = (tree / "olmo" / "config.py").read_text(encoding="utf-8")
    return [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]


def _fields(node: ast.ClassDef) -> dict[str, str]:
    """Field -> annotation."""
    return {
        statement.target.id: ast.unparse(statement.annotation)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
