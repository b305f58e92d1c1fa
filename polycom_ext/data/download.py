"""Files over HTTP, resumed where they broke off, and compared with what is published before anyone reads one.

`requests` knows proxies, certificates and which answers to ask for again; what is here beside it is the
rest of a file that stopped half-way, and what a file must be.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from polycom_ext.errors import PolycomError
from polycom_ext.files import atomic, sha256

HUB = "https://huggingface.co"
TRIES = 5
"""In a row without a byte, or with the wrong bytes in the end."""
AGAIN = (408, 429, 500, 502, 503, 504)
TIMEOUT = (20, 60)
BLOCK = 1 << 20


class Stopped(Exception):
    """Somebody has ended the work."""


@dataclass(frozen=True)
class Remote:
    """A file somewhere, and what is known of it before it is here."""

    url: str
    size: int | None = None
    sha256: str | None = None


class Downloads:
    """Fetches files into a folder, `FOLDER/HOST/PATH`, from where they lie or from a mirror.

    Args:
        folder: where they are kept.
        mirror: a URL or a folder that has `HOST/PATH` of each file, as `wget --force-directories` leaves
            them; files of a folder are read where they are.
        pause: seconds before the second try, doubled with each.
    """

    def __init__(self, folder: Path, mirror: str | None = None, pause: float = 1.0) -> None:
        self._folder, self._pause = folder, pause
        self.mirror = (mirror or "").removeprefix("file://").rstrip("/")
        self.stop = threading.Event()
        self._session = requests.Session()
        again = Retry(TRIES, backoff_factor=pause, status_forcelist=AGAIN, raise_on_status=False)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=again, pool_maxsize=32))

    @property
    def local(self) -> bool:
        """Whether the mirror is a folder."""
        return bool(self.mirror) and "://" not in self.mirror

    @property
    def hub(self) -> str:
        """The address that stands for the Hugging Face hub."""
        return f"{self.mirror}/{urlsplit(HUB).netloc}" if self.mirror else str(constants.ENDPOINT)

    def path(self, url: str) -> Path:
        """Where a file is once it has been fetched."""
        place = urlsplit(url)
        parts = [part for part in unquote(place.path).split("/") if part not in ("", ".", "..")]
        return (Path(self.mirror) if self.local else self._folder).joinpath(place.netloc, *parts)

    def text(self, url: str) -> str:
        """A short text, as it is now."""
        if self.local:
            return self.get(Remote(url)).read_text(encoding="utf-8")
        try:
            with self._session.get(self._address(url), headers=self._headers(url), timeout=TIMEOUT) as answer:
                self._refuse(url, answer)
                return answer.content.decode("utf-8")
        except (requests.RequestException, UnicodeDecodeError) as error:
            raise _unreachable(url, error) from None

    def size(self, url: str) -> int | None:
        """How many bytes a file has, if its server says so."""
        if self.local:
            return self.get(Remote(url)).stat().st_size
        headers = {**self._headers(url), "Accept-Encoding": "identity"}
        try:
            with self._session.head(
                self._address(url), headers=headers, timeout=TIMEOUT, allow_redirects=True
            ) as answer:
                self._refuse(url, answer)
                said = answer.headers.get("Content-Length")
                return int(said) if said else None
        except requests.RequestException as error:
            raise _unreachable(url, error) from None

    def get(self, file: Remote) -> Path:
        """The file, whole: as it lies here if it is what it should be, else fetched.

        One that is not is thrown away and fetched anew. Its time is that of the server, so that whoever
        fetches it has the same file.

        Raises:
            PolycomError: it cannot be had, or is never what is published.
            Stopped: `stop` was set meanwhile.
        """
        path = self.path(file.url)
        if self.local:
            if not path.is_file():
                raise PolycomError(f"{path} is not there; a mirror has HOST/PATH of each file, as {file.url}")
            if problem := _problem(path, file, None):
                raise PolycomError(f"{path} {problem}; mend the mirror")
            return path
        kept = path.with_name(f"{path.name}.sha256")
        if path.is_file() and kept.is_file():
            if not _problem(path, file, kept.read_text()):
                return path
            self.discard(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.part")
        for _ in range(TRIES):
            modified = self._whole(file.url, partial)
            digest = sha256(partial)
            problem = _differs(partial.stat().st_size, digest, file.size, file.sha256)
            if not problem:
                with atomic(kept) as written:
                    written.write(digest.encode())
                os.utime(partial, (modified, modified))
                partial.replace(path)
                partial.with_name(f"{partial.name}.etag").unlink(missing_ok=True)
                return path
            partial.unlink()
        raise PolycomError(f"{file.url} {problem}, {TRIES} times; is there another --mirror of it?")

    def discard(self, file: Remote) -> None:
        """Remove what was fetched of a file; a mirror's own stays."""
        path = self.path(file.url)
        if not self.local:
            for name in (path.name, f"{path.name}.sha256", f"{path.name}.part", f"{path.name}.part.etag"):
                path.with_name(name).unlink(missing_ok=True)

    def _whole(self, url: str, partial: Path) -> float:
        """Fetch what is missing of a file until all is there; return the time of its last change."""
        failures = 0
        while True:
            before = partial.stat().st_size if partial.exists() else 0
            try:
                return self._more(url, partial)
            except requests.RequestException as error:  # which has been repeated
                raise _unreachable(url, error) from None
            except (HTTPError, EOFError) as error:
                now = partial.stat().st_size if partial.exists() else 0
                failures = 1 if now > before else failures + 1
                if failures >= TRIES:
                    raise _unreachable(url, error) from None
                if self.stop.wait(self._pause * 2 ** (failures - 1)):
                    raise Stopped from None

    def _more(self, url: str, partial: Path) -> float:
        """One request: the rest of the file, or all of it where it changed meanwhile."""
        tag = partial.with_name(f"{partial.name}.etag")
        have = partial.stat().st_size if partial.exists() and tag.exists() else 0
        headers = {**self._headers(url), "Accept-Encoding": "identity"}
        if have:
            headers.update({"Range": f"bytes={have}-", "If-Range": tag.read_text()})
        with self._session.get(self._address(url), headers=headers, timeout=TIMEOUT, stream=True) as answer:
            modified = _time(answer.headers.get("Last-Modified"))
            if answer.status_code == requests.codes.requested_range_not_satisfiable:
                if answer.headers.get("Content-Range", "").endswith(f"/{have}"):
                    return modified
                partial.unlink()
                raise EOFError("it was longer than it is now")
            self._refuse(url, answer)
            goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if not (have and answer.status_code == requests.codes.partial_content and goes_on):
                have = 0
                partial.write_bytes(b"")
                tag.unlink(missing_ok=True)
                known = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
                if known and not known.startswith("W/"):  # a weak one does not vouch for bytes
                    tag.write_text(known)
            length = answer.headers.get("Content-Length")
            with partial.open("ab") as file:
                # Not decoded: some servers say of a .gz that it is an encoding.
                for block in answer.raw.stream(BLOCK, decode_content=False):
                    if self.stop.is_set():
                        raise Stopped
                    file.write(block)
            if length and partial.stat().st_size != have + int(length):
                raise EOFError("it ended too soon")
            return modified

    def _address(self, url: str) -> str:
        if self.mirror:
            return f"{self.mirror}/{url.partition('://')[2]}"
        return self.hub + url.removeprefix(HUB) if url.startswith(f"{HUB}/") else url

    def _headers(self, url: str) -> dict[str, str]:
        """HF_TOKEN, for the hub alone: `requests` drops it where the hub sends to another host."""
        headers: dict[str, str] = build_hf_headers() if url.startswith(f"{HUB}/") else {}
        return headers

    def _refuse(self, url: str, answer: requests.Response) -> None:
        """Raise for an answer that is none: for good what no repetition mends."""
        status = answer.status_code
        if status in AGAIN:
            answer.raise_for_status()
        if status in (401, 403):
            raise PolycomError(
                f"{url} is not for everybody (status {status}): on the Hugging Face hub, set HF_TOKEN to a "
                f"token "
                "of an account that has accepted its terms"
            )
        if status >= 400:
            raise PolycomError(
                f"{url} is not there (status {status}); has it moved? --mirror names another place"
            )


def _problem(path: Path, file: Remote, kept: str | None) -> str:
    """How a file differs from what is known of it, as half a sentence; empty if it does not.

    `kept` is the hash that it had when it was fetched: of a file of a mirror there is none.
    """
    wanted = file.sha256 or kept
    return _differs(path.stat().st_size, sha256(path) if wanted else "", file.size, wanted)


def _differs(size: int, digest: str, wanted_size: int | None, wanted: str | None) -> str:
    if wanted_size is not None and size != wanted_size:
        return f"has {size} bytes, not {wanted_size}"
    return f"has sha256 {digest}, not {wanted}" if wanted and digest != wanted else ""


def _time(said: str | None) -> float:
    """Seconds since 1970 of a Last-Modified; 0 without one, so that it is always the same."""
    try:
        return parsedate_to_datetime(said).timestamp() if said else 0.0
    except ValueError:
        return 0.0


def _unreachable(url: str, error: Any) -> PolycomError:
    reason = str(error).partition("\n")[0]
    return PolycomError(f"{url} cannot be fetched ({reason}); give the same command again to go on")
