"""The patch manager: pinned upstream trees, fetched, patched, and known at any time to be what they are."""

from __future__ import annotations

from pathlib import Path

from polycom_ext.upstream import fetch, pins, trees

__all__ = ["ensure_applied", "state", "tree"]


def tree(name: str) -> Path:
    """Where the tree of an upstream is, or will be."""
    return pins.trees_dir() / pins.get(name).name


def ensure_applied(name: str) -> Path:
    """Fetch and patch an upstream unless that is done, and return its tree."""
    pin = pins.get(name)
    fetch.fetch(pin)
    trees.apply(pin)
    return tree(name)


def state(name: str) -> dict[str, object]:
    """Version, state, patches and files of an upstream's tree, as JSON has them."""
    return trees.status(pins.get(name)).as_json()
