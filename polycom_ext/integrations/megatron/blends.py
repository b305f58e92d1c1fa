"""Blends of token files: on the command line while they are short, else in a file of the run directory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polycom_ext.errors import PolycomError

SPLITS = {"train": "train-data-path", "valid": "valid-data-path", "test": "test-data-path"}
OPTIONS = ("data-path", *SPLITS.values())
FILE_OPTIONS = ("data-args-path", "per-split-data-args-path")
UNREADABLE = (OSError, ValueError, AttributeError, TypeError)
LONG = 64
"""Words of a blend, paths and weights, from which it is written to a file: a corpus has thousands, and Linux
limits the length of the command line that every rank carries."""


def files(options: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Option of FILE_OPTIONS -> {name of the file: its text}, for the blends that are long."""
    found = {}
    blend = words(options.get("data-path"))
    if blend is not None and len(blend) > LONG:
        found["data-args-path"] = {"data.txt": "".join(f"{word}\n" for word in blend)}
    splits = {split: words(options.get(name)) for split, name in SPLITS.items()}
    if sum(len(blend or ()) for blend in splits.values()) > LONG:
        found["per-split-data-args-path"] = {"data.json": json.dumps(splits, indent=1) + "\n"}
    return found


def arguments(options: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """The options with each long blend as the file that `files` makes of it."""
    shorter = dict(options)
    for option, written in files(options).items():
        for name in ("data-path",) if option == "data-args-path" else SPLITS.values():
            shorter.pop(name, None)
        [file] = written
        shorter[option] = str(run_dir / file)
    return shorter


def check(name: str, options: Mapping[str, Any]) -> None:
    """Refuse what a file cannot say: upstream splits the words of --data-args-path at white space."""
    if "data-args-path" in files(options):
        for word in words(options["data-path"]) or ():
            if len(word.split()) != 1:
                raise PolycomError(
                    f"{name}: megatron.data-path has more than {LONG} words, so it goes into a file, where "
                    f"Megatron ends a path at white space: rename {word!r}"
                )


def training(options: Mapping[str, Any]) -> list[str]:
    """The data sets that a run trains on, as far as its options, or files that these name, say it."""
    blends = [words(options.get(name)) or [] for name in ("data-path", SPLITS["train"])]
    for name in FILE_OPTIONS:
        path = Path(str(options.get(name)))
        if path.is_file():
            with contextlib.suppress(*UNREADABLE):
                listed = read(name, path)
                blends.append(listed.get("train") or listed.get("") or [])
    return [prefix for blend in blends for prefix in prefixes(blend)]


def read(option: str, path: Path) -> dict[str, list[str]]:
    """Split -> words of the blends in a file that one of FILE_OPTIONS names; of all splits together, "".

    Raises one of UNREADABLE for a file that upstream cannot read.
    """
    text = path.read_text(encoding="utf-8")
    splits = json.loads(text).items() if option.startswith("per-split") else [("", text)]
    return {
        split: blend.split() if isinstance(blend, str) else list(map(str, blend or []))
        for split, blend in splits
    }


def prefixes(blend: list[str]) -> list[str]:
    """The data sets of a blend: every second word, where all the others are weights, else every word."""
    weighted = len(blend) % 2 == 0 and all(map(_is_number, blend[::2]))
    return blend[1::2] if weighted else blend


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def words(value: Any) -> list[str] | None:
    """A value of an option that takes a list, as upstream gets it; None where it is not given."""
    if value is None:
        return None
    return [str(word) for word in (value if isinstance(value, list) else [value])]
