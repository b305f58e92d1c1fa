"""Which files a corpus is made of: asked once and kept in `files.json`, for all nodes and all later runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import huggingface_hub
import requests
from huggingface_hub.errors import HfHubHTTPError

from polycom_ext.data.download import HUB, Downloads, Remote
from polycom_ext.data.recipe import Recipe, Source
from polycom_ext.errors import PolycomError
from polycom_ext.files import lock, write_text

AT_ONCE = 16


@dataclass(frozen=True)
class Part:
    """One file of a corpus, which becomes one data set."""

    source: str
    split: str
    """`train` or `valid`."""
    index: int
    """Among the files of its source, by name."""
    file: Remote

    @property
    def name(self) -> str:
        """Of its data set, below the folder of the corpus."""
        return f"{self.split}/{self.source}-{self.index:05d}"


@dataclass(frozen=True)
class Listing:
    """The files of a corpus."""

    parts: list[Part]
    share: float
    published: dict[str, int]
    """Source -> how many files it has, those included that a share leaves out."""


def settled(recipe: Recipe, folder: Path, share: float, downloads: Downloads) -> Listing:
    """The listing in a folder, made if it is not there yet.

    Raises:
        PolycomError: the folder's is of another recipe or share, or a source has no files.
    """
    path, wanted = folder / "files.json", {"recipe": recipe.name, "share": share}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".files.lock").open("wb") as held:
        lock(held, wait=True)
        if path.exists():
            return _read(path, wanted)
        listing = _listed(recipe, share, downloads)
        text = json.dumps({**wanted, **asdict(listing)}, indent=1)
        write_text(path, text + "\n")
    return listing


def read(folder: Path, recipe: Recipe) -> Listing:
    """The listing of a folder that exists. Raises PolycomError where there is none, or of another recipe."""
    path = folder / "files.json"
    if not path.exists():
        raise PolycomError(f"{path} is not there; `polycom data fetch {recipe.name}` makes it")
    return _read(path, {"recipe": recipe.name})


def _read(path: Path, wanted: dict[str, Any]) -> Listing:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        parts = [Part(**{**part, "file": Remote(**part["file"])}) for part in said["parts"]]
        listing = Listing(parts, said["share"], said["published"])
    except (ValueError, KeyError, TypeError):
        raise PolycomError(f"{path} was not made by `polycom data fetch`; choose another --output") from None
    for name, value in wanted.items():
        if said.get(name) != value:
            raise PolycomError(
                f"{path} is of {name} {said.get(name)}, not {value}; choose another --output, or remove it"
            )
    return listing


def _listed(recipe: Recipe, share: float, downloads: Downloads) -> Listing:
    parts: list[Part] = []
    published = {}
    for label, source in recipe.train.items():
        found = sorted(_files(label, source, downloads), key=lambda file: file.url)
        published[label] = len(found)
        if len(found) <= source.held_out:
            raise PolycomError(
                f"{recipe.name}: no files of {label} match {source.match} where they should be listed"
            )
        train = len(found) - source.held_out
        taken = {*_spread(train, share), *range(train, len(found))}
        for index in sorted(taken):
            parts.append(Part(label, "train" if index < train else "valid", index, found[index]))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return Listing(list(pool.map(partial(_sized, downloads), parts)), share, published)


def _spread(count: int, share: float) -> Iterator[int]:
    """Which of `count` files make a share of them: at least one, evenly spread."""
    wanted = max(round(count * share), 1)
    return (index * count // wanted for index in range(wanted))


def _sized(downloads: Downloads, part: Part) -> Part:
    size = part.file.size if part.file.size is not None else downloads.size(part.file.url)
    return replace(part, file=replace(part.file, size=size))


def _files(label: str, source: Source, downloads: Downloads) -> list[Remote]:
    if source.hub:
        return list(_on_hub(source, downloads))
    sums = _sums(downloads.text(source.sha256)) if source.sha256 else {}
    urls = (line.strip() for line in downloads.text(source.urls).splitlines())
    return [
        Remote(url, None, _sum_of(url, sums))
        for url in dict.fromkeys(urls)
        if urlsplit(url).scheme in ("http", "https") and fnmatchcase(url, source.match)
    ]


def _on_hub(source: Source, downloads: Downloads) -> Iterator[Remote]:
    """The files of a data set, with the hub's sizes and hashes; a mirror that is a folder has neither."""
    base = hub_url(source.hub, "", source.revision, "datasets/")
    if downloads.local:
        root = downloads.path(base)
        for path in root.rglob("*"):
            name = path.relative_to(root).as_posix()
            if path.is_file() and fnmatchcase(name, source.match):
                yield Remote(base + quote(name))
        return
    fixed = source.match.partition("*")[0].rpartition("/")[0] or None
    try:
        for entry in huggingface_hub.HfApi(endpoint=downloads.hub).list_repo_tree(
            source.hub, fixed, recursive=True, revision=source.revision, repo_type="dataset"
        ):
            if isinstance(entry, huggingface_hub.hf_api.RepoFile) and fnmatchcase(entry.path, source.match):
                digest = entry.lfs.sha256 if entry.lfs else None
                yield Remote(base + quote(entry.path), entry.size, digest)
    except (HfHubHTTPError, requests.RequestException) as error:
        reason = str(error).partition("\n")[0]
        raise PolycomError(
            f"the files of {source.hub} cannot be listed ({reason}); is {HUB} reachable from here? "
            f"HF_ENDPOINT or "
            "--mirror name another place"
        ) from None


def hub_url(repository: str, file: str, revision: str, kind: str = "") -> str:
    """The address of a file on the Hugging Face hub, wherever the hub is mirrored."""
    return f"{HUB}/{kind}{repository}/resolve/{quote(revision, safe='')}/{quote(file)}"


def _sums(text: str) -> dict[str, list[tuple[tuple[str, ...], str]]]:
    """Name of a file -> (parts of its path, SHA-256) of each line of `sha256sum`'s."""
    sums: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for line in text.splitlines():
        digest, _, path = line.strip().partition(" ")
        parts = PurePosixPath(path.strip().removeprefix("*")).parts
        if len(digest) == 64 and parts:
            sums.setdefault(parts[-1], []).append((parts, digest.lower()))
    return sums


def _sum_of(url: str, sums: dict[str, list[tuple[tuple[str, ...], str]]]) -> str | None:
    """The hash of the path that agrees with a URL's in most of its last parts; None where several do."""
    parts = PurePosixPath(unquote(urlsplit(url).path)).parts
    agreeing: dict[int, set[str]] = {}
    for other, digest in sums.get(parts[-1], ()):
        same = 0
        while same < min(len(parts), len(other)) and parts[-1 - same] == other[-1 - same]:
            same += 1
        agreeing.setdefault(same, set()).add(digest)
    best = agreeing.get(max(agreeing, default=0), set())
    return best.pop() if len(best) == 1 else None
