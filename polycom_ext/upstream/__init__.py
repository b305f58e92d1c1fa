"""The patch manager: pinned upstream trees, fetched, patched, and known at any time to be what they are."""

from __future__ import annotations

import os
from pathlib import Path

from polycom_ext.errors import PolycomError
from polycom_ext.upstream import fetch, pins, trees

__all__ = ["ensure_applied", "state", "tree"]


def tree(name: str) -> Path:
    """Where the tree of an upstream is, or will be.

    Raises PolycomError for a place that cannot be on PYTHONPATH, which divides its folders at colons.
    """
    folder = pins.trees_dir() / pins.get(name).name
    if os.pathsep in str(folder):
        raise PolycomError(
            f"{folder} cannot be on PYTHONPATH, because its name holds a {os.pathsep!r}: "
            "set POLYCOM_UPSTREAM_DIR to a folder without one"
        )
    return folder


def ensure_applied(name: str) -> Path:
    """Fetch and patch an upstream unless that is done, and return its tree."""
    pin = pins.get(name)
    where = tree(name)
    fetch.fetch(pin)
    trees.apply(pin)
    return where


def state(name: str) -> dict[str, object]:
    """Version, state, patches and files of an upstream's tree, as JSON has them."""
    return trees.status(pins.get(name)).as_json()
