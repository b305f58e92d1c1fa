"""Types of command-line arguments that several verbs take; their complaints end argparse's sentence."""

from __future__ import annotations

import argparse
from pathlib import Path


def output(text: str) -> Path:
    """The path that a user gave as --output, with a name."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a folder or file")
    if not Path(text).resolve().name:
        raise argparse.ArgumentTypeError(f"{text} is the root folder; name one of your own")
    return Path(text) if Path(text).name else Path(text).resolve()


def count(text: str) -> int:
    """How many of something there are to be, at least one."""
    return _whole(text, 1)


def count_or_none(text: str) -> int:
    """How many of something there may be, 0 for none."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} up")
    return int(text)
