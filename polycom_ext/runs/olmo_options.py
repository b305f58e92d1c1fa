"""The options of an OLMo, patched or not, read from the dataclasses of its config.py without running it."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path


@lru_cache
def known(tree: Path) -> set[str]:
    """The names of TrainConfig's fields, and `section.field` for those that are dataclasses themselves."""
    source = (tree / "olmo" / "config.py").read_text(encoding="utf-8")
    classes = {node.name: _fields(node) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    names = set()
    for name, annotation in classes["TrainConfig"].items():
        names.add(name)
        section = re.sub(r"Optional\[(\w+)\]", r"\1", annotation)
        names.update(f"{name}.{field}" for field in classes.get(section, ()))
    return names


def _fields(node: ast.ClassDef) -> dict[str, str]:
    """Field -> annotation."""
    return {
        statement.target.id: ast.unparse(statement.annotation)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
