"""The hosts of the paper's corpora, as far as tests need them.

Texts under the published names, served with ranges, hashes and the Hugging Face hub's listing, and faults
on demand.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import zstandard
from tokenizers import Tokenizer

from polycom_ext.data import recipe as recipes

TOGETHER = "data.together.xyz/redpajama-data-1T/v1.0.0"
REDPAJAMA = {
    "common_crawl": [
        f"common_crawl/{dump}/en_head_0000.json.gz.dedup.classifier.jsonl.zst"
        for dump in ("2019-30", "2023-06")
    ],
    "c4": [f"c4/c4-train.0000{index}-of-01024.jsonl" for index in range(2)],
    "github": [f"github/filtered_{name}.jsonl" for name in ("0a", "1b")],
    "arxiv": [f"arxiv/arxiv_{name}.jsonl" for name in ("02", "17")],
    "wikipedia": ["wikipedia/wiki.jsonl"],
    "stackexchange": ["stackexchange/stackexchange.jsonl"],
}
OLMOE = {
    "dclm": ["dclm/dclm-0000.json.zst", "dclm/dclm-0001.json.zst"],
    "starcoder": ["starcoder/ada-0000.json.gz", "starcoder/c-sharp-0000.json.gz"],
    "pes2o": ["pes2o/pes2o-0000.json.gz"],
    "arxiv": ["arxiv/arxiv-0000.json.gz"],
    "open-web-math": ["open-web-math/open-web-math-train-0000.json.gz", "open-web-math/041.jsonl.gz"],
    "algebraic-stack": ["algebraic-stack/algebraic-stack-train-0000.json.gz"],
    "wiki": ["wiki/wiki-0000.json.gz"],
}


def build(root: Path, texts: Sequence[str], tokenizer: Path) -> None:
    """Write HOST/PATH of both corpora below `root`: every file holds other texts."""
    every = sum(map(len, (*REDPAJAMA.values(), *OLMOE.values())))
    shares = iter([texts[index::every] for index in range(every)])
    urls = []
    for source, names in REDPAJAMA.items():
        sums = []
        for name in names:
            path = root / TOGETHER / name
            _write(path, next(shares))
            urls.append(f"https://{TOGETHER}/{name}")
            sums.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name.partition('/')[2]}\n")
        _save(root / TOGETHER / "sha256" / f"{source}_SHA256SUMS.txt", "".join(sums).encode())
    _save(
        root / TOGETHER / "urls.txt", "\n".join([*urls, f"https://{TOGETHER}/book/book.jsonl", ""]).encode()
    )

    mix = recipes.load("olmoe-mix-0924")
    for source, names in OLMOE.items():
        for name in names:
            revision = mix.train[source].revision
            _write(
                root / f"huggingface.co/datasets/{mix.train[source].hub}/resolve/{revision}/data/{name}",
                next(shares),
            )
    encoder, eos = Tokenizer.from_file(str(tokenizer)), mix.validation.eos_id
    for number, url in enumerate(mix.validation.sets.values()):
        ids = [[*encoder.encode(text).ids, eos] for text in texts[number::11][:4]]
        _save(root / url.partition("://")[2], np.concatenate(ids).astype("<u2").tobytes())

    content = tokenizer.read_bytes()
    for name in recipes.names():
        said = recipes.load(name).tokenizer
        path = root / f"huggingface.co/{said.hub}/resolve/{said.revision}/{said.file}"
        _save(path, content.replace(b"<|endoftext|>", (said.eos or "").encode()))


def _write(path: Path, texts: Sequence[str]) -> None:
    content = "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    _save(path, content)


def _save(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


class Hosts(ThreadingHTTPServer):
    """Serves `root/HOST/PATH` as `/HOST/PATH`, and what the hub's API says of its data sets."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.root = root
        self.cut: Counter[str] = Counter()
        """Name of a file -> how many more times its answer ends half-way."""
        self.changes: dict[str, bytes] = {}
        """Name of a file -> what is in it after an answer that ended half-way."""
        self.damaged: Counter[str] = Counter()
        """Name of a file -> how many more times a byte of it is another."""
        self.busy: Counter[str] = Counter()
        """Name of a file -> how many more times the answer is 503."""
        self.pause = 0.0
        """Seconds between two blocks of a file."""
        self.asked: list[tuple[str, str, str | None, str | None]] = []
        """Method, path, Range and Authorization of each request."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def ranges(self, name: str) -> list[str | None]:
        """The Range of each request for the content of a file."""
        return [
            range_ for method, path, range_, _ in self.asked if method == "GET" and path.endswith(f"/{name}")
        ]


class _Answer(BaseHTTPRequestHandler):
    server: Hosts
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked_for = urlsplit(self.path)  # a proxy is asked for the host too
        place = unquote(
            f"/{asked_for.netloc.replace('corpora.invalid', '')}{asked_for.path}".replace("//", "/")
        )
        asked = self.headers.get("Range")
        self.server.asked.append((self.command, place, asked, self.headers.get("Authorization")))
        path = self.server.root / place.lstrip("/")
        if "/api/datasets/" in place:
            self._tree(place)
        elif self.command == "GET" and self.server.busy[path.name] > 0:
            self.server.busy[path.name] -= 1
            self._send(503, b"", {"Retry-After": "0"})
        elif not path.is_file():
            self._send(404, b"", {})
        else:
            self._file(path, asked)

    def _file(self, path: Path, asked: str | None) -> None:
        content = path.read_bytes()
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        headers = {"ETag": tag, "Last-Modified": formatdate(1.7e9, usegmt=True)}
        if self.server.damaged[path.name] > 0 and self.command == "GET":
            self.server.damaged[path.name] -= 1
            content = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        first = 0
        if asked and self.headers.get("If-Range", tag) == tag:
            first = int(asked.removeprefix("bytes=").rstrip("-"))
            if first >= len(content):
                self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self._send(206 if first else 200, content[first:], headers, path.name)

    def _tree(self, place: str) -> None:
        """`/HUB/api/datasets/OWNER/NAME/tree/REVISION/FOLDER`, with the hash of each file."""
        hub, _, rest = place.partition("/api/")
        repository, _, rest = rest.partition("/tree/")
        revision, _, folder = rest.partition("/")
        root = self.server.root / f"{hub.lstrip('/')}/{repository}/resolve/{revision}"
        entries = [
            {
                "type": "file",
                "oid": "0" * 40,
                "size": path.stat().st_size,
                "path": str(path.relative_to(root)),
                "lfs": {
                    "oid": hashlib.sha256(path.read_bytes()).hexdigest(),
                    "size": path.stat().st_size,
                    "pointerSize": 134,
                },
            }
            for path in sorted((root / folder).rglob("*"))
            if path.is_file()
        ]
        self._send(
            200 if entries else 404, json.dumps(entries).encode(), {"Content-Type": "application/json"}
        )

    def _send(self, status: int, body: bytes, headers: dict[str, str], name: str = "") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.cut[name] > 0:
            self.server.cut[name] -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            if name in self.server.changes:
                (self.server.root / urlsplit(self.path).path.lstrip("/")).write_bytes(
                    self.server.changes[name]
                )
            return
        step = 1 << 9 if self.server.pause else len(body) or 1
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            time.sleep(self.server.pause)
