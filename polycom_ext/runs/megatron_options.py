"""The options that a Megatron tree really has, asked of its own argument parser.

Importing upstream takes seconds and changes the process, so a child process does it, once per commit of the
tree; the answer is kept beside the tree. Run as a module, this file is that child process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polycom_ext.errors import PolycomError


@dataclass(frozen=True)
class Option:
    """One long option of upstream's parser, as far as its value can be checked before a start."""

    takes_value: bool
    negatable: bool
    """`--no-NAME` exists and belongs to this option."""
    several: bool
    """Takes a list of values."""
    kind: str
    """`int`, `float`, or `any` for what only upstream can judge."""
    choices: list[str] | None

    def problem(self, value: Any) -> str | None:
        """What is wrong with a spec's value for this option, as the end of a sentence; None if nothing is."""
        if not self.takes_value:
            return None if isinstance(value, bool) else f"is a flag: true or false, not {value!r}"
        if isinstance(value, bool):
            return "needs a value"
        if isinstance(value, list) and not self.several:
            return f"takes one value, not a list: {value!r}"
        for item in value if isinstance(value, list) else [value]:
            if self.kind != "any" and not _is_number(item, self.kind):
                return f"must be {'an integer' if self.kind == 'int' else 'a number'}, not {item!r}"
            if self.choices is not None and str(item) not in self.choices:
                return f"must be one of {', '.join(self.choices)}, not {item!r}"
        return None


def known(tree: Path) -> dict[str, Option]:
    """Long option names without dashes -> Option, of the Megatron tree; cached by the tree's commit.

    Raises PolycomError if upstream's parser cannot be imported.
    """
    git = ["git", "-C", str(tree)]
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    edits = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    cache = tree.parent / f".options-{tree.name}-{commit[:12]}.json"
    if edits or not cache.exists():
        table = _ask(tree)
        if edits:
            return _read(table)
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_text(table, encoding="utf-8")
        partial.replace(cache)
    return _read(cache.read_text(encoding="utf-8"))


def _read(table: str) -> dict[str, Option]:
    return {name: Option(**fields) for name, fields in json.loads(table).items()}


def _ask(tree: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        reason = (child.stderr.strip() or "no reason given").splitlines()[-1]
        raise PolycomError(
            f"Megatron's argument parser in {tree} cannot be imported: {reason}; "
            "`pip install 'polycom-ext[megatron]'` installs what it needs"
        )
    return child.stdout.splitlines()[-1]


def _is_number(value: Any, kind: str) -> bool:
    try:
        int(str(value)) if kind == "int" else float(value)
    except (TypeError, ValueError):
        return False
    return True


def _describe(parser: argparse.ArgumentParser) -> dict[str, Option]:
    options = {}
    for action in parser._actions:
        negatable = isinstance(action, argparse.BooleanOptionalAction)
        choices = None if action.choices is None else [str(choice) for choice in action.choices]
        option = Option(
            takes_value=action.nargs != 0,
            negatable=negatable,
            several=action.nargs in ("*", "+") or (isinstance(action.nargs, int) and action.nargs > 1),
            kind={int: "int", float: "float"}.get(action.type, "any"),  # type: ignore[call-overload]
            choices=choices,
        )
        for name in action.option_strings:
            if name.startswith("--") and not (negatable and name.startswith("--no-")):
                options[name[2:]] = option
    return options


def _main() -> None:
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    print(json.dumps({name: asdict(option) for name, option in _describe(parser).items()}))


if __name__ == "__main__":
    _main()
