"""What a prepared data set was made from: kept beside it, compared before its work is reused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from polycom_ext.data.progress import progress
from polycom_ext.data.streams import cannot_read
from polycom_ext.errors import PolycomError
from polycom_ext.files import atomic, sha256

Manifest = dict[str, Any]
"""`settings`: name -> value; `inputs`: {path, size, modified_ns, sha256} of each; what its writer adds."""


def read(path: Path) -> Manifest | None:
    """The manifest at `path`, None if there is no such file.

    Raises:
        PolycomError: the file is something else.
    """
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not {"settings", "inputs"} <= manifest.keys():
        raise PolycomError(f"{path} was not made by `polycom data prepare`; choose another --output")
    return manifest


def write(path: Path, manifest: Manifest, temporary: Path | None = None) -> None:
    """Write readable JSON, atomically; bytes of file names that are not UTF-8 are `\\udcXX`, as in Python."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    with atomic(path, temporary) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def fingerprints(inputs: Sequence[Path], known: Iterable[Manifest]) -> list[dict[str, Any]]:
    """Size, time and SHA-256 of every input.

    A file with the path, size and time of an entry in `known` is taken to be that file and not read again.
    """
    hashes = {
        (item["path"], item["size"], item["modified_ns"]): item["sha256"]
        for manifest in known
        for item in manifest["inputs"]
    }
    stats = [path.stat() for path in inputs]
    entries = []
    keys = [
        (os.fspath(path), stat.st_size, stat.st_mtime_ns) for path, stat in zip(inputs, stats, strict=True)
    ]
    with progress(sum(key[1] for key in keys if key not in hashes), "hashing") as bar:
        for path, key in zip(inputs, keys, strict=True):
            try:
                digest = hashes.get(key) or sha256(path, bar.update)
            except OSError as error:
                raise cannot_read(path, error) from None
            entries.append({"path": key[0], "size": key[1], "modified_ns": key[2], "sha256": digest})
    return entries


def difference(old: Manifest, new: Manifest) -> str:
    """How the settings and inputs of two manifests differ, as a half sentence; empty if they do not."""
    changes = [
        f"{name} {old['settings'].get(name)}, not {value}"
        for name, value in new["settings"].items()
        if old["settings"].get(name) != value
    ]
    contents = [[(item["size"], item["sha256"]) for item in manifest["inputs"]] for manifest in (old, new)]
    if contents[0] != contents[1]:
        changes.append("other inputs, or inputs that changed since")
    return " and ".join(changes)
