"""The options that a Megatron tree really has, and which of them make the model, asked of upstream itself.

Importing upstream takes seconds and changes the process, so a child process does it, once per commit of the
tree; the answer is kept beside the tree. Run as a module, this file is that child process.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import enum
import inspect
import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from polycom_ext import files
from polycom_ext.errors import PolycomError
from polycom_ext.runs import document
from polycom_ext.upstream import git

ARCHITECTURE = (
    "network size",
    "tokenizer",
    "moe",
    "mla",
    "experimental_attention_variant",
    "heterogeneous architecture",
)
"""Titles of upstream's groups of options that describe the model."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One long option of upstream's parser, as far as its value can be judged before a start."""

    takes_value: bool
    negatable: bool
    """`--no-NAME` exists and belongs to this option."""
    several: bool
    """Takes a list of values."""
    kind: str
    """`int`, `float`, or `any` for what only upstream can judge: it gets the text as written."""
    choices: list[str] | None
    dest: str
    """Options of one dest set the same thing."""
    default: Any
    const: Any
    """What a flag sets its dest to."""
    of_model: bool
    """Upstream builds the model from it: it is a field of the transformer's configuration or is read with
    them, or lies in a group of ARCHITECTURE; ModelParallelConfig, which divides the work, is left out."""

    def problem(self, value: Any) -> str | None:
        """What is wrong with a spec's value for this option, as the end of a sentence; None if nothing is."""
        if not self.takes_value:
            return None if isinstance(value, bool) else f"is a flag: true or false, not {value!r}"
        if isinstance(value, bool):
            return "needs a value"
        if isinstance(value, list) and not self.several:
            return f"takes one value, not a list: {value!r}"
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool) or not isinstance(item, str | int | float):
                return f"takes texts and numbers, not {item!r}: quote it"
            if self.kind != "any" and not _is_number(item, self.kind):
                return f"must be {'an integer' if self.kind == 'int' else 'a number'}, not {item!r}"
            if self.choices is not None and str(item) not in self.choices:
                return f"must be one of {', '.join(self.choices)}, not {item!r}"
        return None

    def effect(self, value: Any) -> Any:
        """What a spec's value comes to, in the form of `default`: two ways to write one number are equal."""
        if not self.takes_value:
            return self.const if value else self.default
        return _comparable([value] if self.several and not isinstance(value, list) else value, self.kind)


def known(tree: Path) -> dict[str, Option]:
    """Long option names without dashes -> Option, of the Megatron tree; cached by its commit.

    Where the cache cannot be read it is made again, and where it cannot be written it is done without. A tree
    that was edited, or of which git knows nothing, is asked by every process.

    Raises PolycomError if upstream's parser cannot be imported.
    """
    return _known(tree, git.commit_of(tree))


@lru_cache
def _known(tree: Path, commit: str | None) -> dict[str, Option]:
    if commit is None or not commit.isalnum():  # COMMIT+changes
        return _options(_ask(tree))
    asker = files.sha256(Path(__file__))
    cache = tree.parent / f".options-{tree.name}-{commit[:12]}-{asker[:8]}.json"
    with contextlib.suppress(
        OSError, ValueError, TypeError, AttributeError
    ):  # none, torn, or of another version
        if options := _options(cache.read_text(encoding="utf-8")):
            return options
    table = _ask(tree)
    with contextlib.suppress(OSError):  # a tree in an image, or on a full disk
        files.write_text(cache, table)
    return _options(table)


def _options(table: str) -> dict[str, Option]:
    return {name: Option(**fields) for name, fields in json.loads(table).items()}


def _ask(tree: Path) -> str:
    paths = [str(tree), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    child = subprocess.run(
        [sys.executable, "-B", "-W", "ignore", "-m", __name__],  # nothing is left in the tree
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    lines = child.stdout.splitlines()
    if child.returncode or not lines:
        reason = (child.stderr.strip() or f"exit status {child.returncode}").splitlines()[-1]
        raise PolycomError(
            f"Megatron's argument parser in {tree} cannot be imported: {reason}; "
            "`pip install 'polycom-ext[megatron]'` installs what it needs"
        )
    return lines[-1]


def _is_number(value: Any, kind: str) -> bool:
    try:
        number = int(str(value)) if kind == "int" else float(value)
    except (ValueError, OverflowError):
        return False
    return kind == "int" or not isinstance(value, str) or document.holds(number, value)


def _comparable(value: Any, kind: str) -> Any:
    """As JSON has it: lists, numbers of a known kind, and the text of everything else."""
    if isinstance(value, list | tuple):
        return [_comparable(item, kind) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if kind != "any" and _is_number(value, kind):
        return int(str(value)) if kind == "int" else float(value)
    return _text(value)


def _text(value: Any) -> str:
    return value.name if isinstance(value, enum.Enum) else str(value)


def _describe(parser: argparse.ArgumentParser, of_model: set[str]) -> dict[str, Option]:
    options = {}
    for action in parser._actions:
        negatable = isinstance(action, argparse.BooleanOptionalAction)
        choices = None if action.choices is None else [_text(choice) for choice in action.choices]
        kind = {int: "int", float: "float"}.get(action.type, "any")  # type: ignore[call-overload]
        option = Option(
            takes_value=action.nargs != 0,
            negatable=negatable,
            several=action.nargs in ("*", "+") or (isinstance(action.nargs, int) and action.nargs > 1),
            kind=kind,
            choices=choices,
            dest=action.dest,
            default=None if action.default is argparse.SUPPRESS else _comparable(action.default, kind),
            const=True if negatable else _comparable(action.const, kind),
            of_model=action.dest in of_model,
        )
        for name in action.option_strings:
            if name.startswith("--") and name != "--help" and not (negatable and name.startswith("--no-")):
                options[name[2:]] = option
    return options


def _of_model(parser: argparse.ArgumentParser) -> set[str]:
    """The dests from which upstream builds a model."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from megatron.training.arguments import core_transformer_config_from_args

    def fields(config: Any) -> set[str]:
        return {field.name for field in dataclasses.fields(config)}

    source = ast.parse(inspect.getsource(core_transformer_config_from_args))
    names = fields(MLATransformerConfig)  # those of TransformerConfig are among them
    names |= {
        node.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    for group in parser._action_groups:
        if group.title in ARCHITECTURE:
            names |= {action.dest for action in group._group_actions}
    return names - fields(ModelParallelConfig)


def _main() -> None:
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    options = _describe(parser, _of_model(parser))
    print(json.dumps({name: dataclasses.asdict(option) for name, option in options.items()}))


if __name__ == "__main__":
    _main()
