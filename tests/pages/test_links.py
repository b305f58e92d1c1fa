"""Links lead somewhere, and the files, make's targets and polycom's verbs that pages name are there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from polycom_ext import cli

from .conftest import PAGES, TOP, name, tokens

TRACKED = set(
    subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=TOP,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
)
TOP_FOLDERS = {path.partition("/")[0] for path in TRACKED if "/" in path}
ROOMS = {path.split("/")[1] for path in TRACKED if path.startswith("polycom_ext/") and path.count("/") > 1}


def links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        for inner in token.children or ():
            if inner.type in ("link_open", "image"):
                yield str(inner.attrs.get("href", inner.attrs.get("src")))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and MyST make them."""
    found = tokens(page)
    headings = [found[at + 1].content for at, token in enumerate(found) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https", link
            assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", parts.netloc), link
            continue
        target = (page.parent / parts.path).resolve() if parts.path else page
        assert target.exists(), link
        if parts.fragment:
            assert parts.fragment in anchors(target), link


def codes(page: Path) -> Iterator[str]:
    """The `inline` pieces of code; blocks of commands are run (test_commands)."""
    for token in tokens(page):
        for inner in token.children or ():
            if inner.type == "code_inline":
                yield inner.content


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_page_names_is_there(page: Path) -> None:
    made_by_its_reader = set(re.findall(r"mkdir (\S+)", page.read_text()))
    targets = set(re.findall(r"^([\w-]+):", (TOP / "Makefile").read_text(), re.MULTILINE))
    for code in codes(page):
        if made := re.match(r"make ([a-z][\w -]*)", code):
            assert set(made[1].split()) <= targets, code
        if asked := re.match(r"polycom ([a-z]+)", code):
            assert asked[1] in cli.VERBS, code
        for path in re.findall(r"(?<![\w./~-])[\w.-]+/[\w./-]*", code):
            assert there(path) or path.rstrip("/") in made_by_its_reader, path


def there(path: str) -> bool:
    """Whether git has it, at the top or in the package.

    NAME stands for any name; of paths that begin elsewhere, say in a user's home, nothing is known.
    """
    first = path.partition("/")[0]
    asked = re.escape(path.rstrip("/")).replace("NAME", "[^/]+")
    for known, folder in ((TOP_FOLDERS, ""), (ROOMS, "polycom_ext/")):
        if first in known:
            return any(re.match(f"{folder}{asked}(/|$)", one) for one in TRACKED)
    return True
