"""`polycom data prepare`: what it writes, that it can be killed, and what it refuses."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer

from polycom_ext.data import shards, token_files
from polycom_ext.data.prepare import prepare as prepare_directly
from polycom_ext.data.settings import Settings
from polycom_ext.data.sources import read_records
from polycom_ext.errors import PolycomError
from polycom_ext.files import exclusive
from polycom_ext.integrations.megatron import token_format

from .conftest import read_documents, write_jsonl

Prepare = Callable[..., tuple[int, str]]


def outputs(prefix: Path) -> dict[str, bytes]:
    """suffix -> content of every file under the prefix."""
    files = [path for path in prefix.parent.glob(f"{prefix.name}.*") if path.is_file()]
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in files}


def test_every_document_is_its_tokens_and_the_end_token(
    prepare: Prepare, texts: list[str], tokenizer: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    status, printed = prepare(source, "--output", tmp_path / "out", "--tokenizer", tokenizer)
    assert status == 0
    encode = Tokenizer.from_file(str(tokenizer)).encode
    metadata = json.loads((tmp_path / "out.json").read_text())
    expected = [[*encode(text).ids, metadata["eos_id"]] for text in texts]
    assert read_documents(tmp_path / "out") == expected
    assert (metadata["documents"], metadata["tokens"]) == (len(texts), sum(map(len, expected)))
    assert f"{metadata['tokens']} tokens" in printed
    assert set(outputs(tmp_path / "out")) == {".bin", ".idx", ".json"}
    assert not (tmp_path / "out.work").exists()


def test_olmo_format_is_the_same_tokens_without_a_header(
    prepare: Prepare, texts: list[str], tokenizer: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    for format_ in ("megatron", "olmo"):
        assert (
            prepare(source, "--output", tmp_path / format_, "--tokenizer", tokenizer, "--format", format_)[0]
            == 0
        )
    assert outputs(tmp_path / "olmo").keys() == {".npy", ".json"}
    assert (tmp_path / "olmo.npy").read_bytes() == (tmp_path / "megatron.bin").read_bytes()
    assert read_documents(tmp_path / "olmo", ".npy") == read_documents(tmp_path / "megatron")


def test_number_of_processes_and_size_of_shards_change_nothing(texts: list[str], tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", texts[:33])
    second = write_jsonl(tmp_path / "b.jsonl", texts[33:])
    results = []
    for workers, shard_bytes in ((1, None), (2, 1000), (3, 5000)):
        output = tmp_path / str(workers)
        prepare_directly(
            Settings([first, second], output, train_tokenizer=300, workers=workers, shard_bytes=shard_bytes)
        )
        results.append(outputs(output))
    for result in results[1:]:
        for suffix in (".bin", ".idx", ".tokenizer.json"):
            assert result[suffix] == results[0][suffix]
    assert len(results[0][".bin"]) > 10_000


def test_killed_run_goes_on_and_gives_the_same_bytes(
    tokenizer: Path, texts: list[str], tmp_path: Path
) -> None:
    many = texts * (7 * (1 << 20) // sum(len(text.encode()) for text in texts))
    source = write_jsonl(tmp_path / "a.jsonl", many)
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    command = [sys.executable, "-m", "polycom_ext.cli", "data", "prepare", str(source), "--workers", "2"]
    command += ["--output", str(killed), "--tokenizer", str(tokenizer)]

    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while not list(tmp_path.glob("killed.work/*.npz")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert outputs(killed) == {}
    deadline = time.monotonic() + 10
    while (alive := _session_is_alive(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    assert not alive, "workers outlive the killed run"

    done = len(list(tmp_path.glob("killed.work/*.npz")))
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"{done} shards are done" in again.stderr
    prepare_directly(Settings([source], straight, tokenizer=tokenizer))
    assert outputs(killed) == outputs(straight)
    assert not (tmp_path / "killed.work").exists()


def _session_is_alive(session: int) -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(") ")[2].split()[:4]
        except OSError:
            continue
        if int(sid) == session and state != "Z":
            return True
    return False


def test_finished_shards_are_not_made_again(tokenizer: Path, texts: list[str], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    settings = Settings([source], tmp_path / "out", tokenizer=tokenizer, shard_bytes=2000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", _interrupting(".idx"))
        with pytest.raises(KeyboardInterrupt):
            prepare_directly(settings)
    assert ".json" not in outputs(tmp_path / "out"), "incomplete, so nothing may vouch for it"
    shards = list(tmp_path.glob("out.work/*.npz"))
    assert len(shards) > 10
    # A shard of other content: it must be taken as it is, because it is not made again.
    marked = min(shards)
    with np.load(marked) as archive:
        arrays = {**archive, "tokens": archive["tokens"] * 0}
    np.savez(marked.open("wb"), **arrays)
    prepare_directly(settings)
    assert read_documents(tmp_path / "out") != []
    tokens = np.fromfile(tmp_path / "out.bin", dtype="<u2")
    assert not tokens[: len(arrays["tokens"])].any()
    assert tokens[len(arrays["tokens"]) :].any()


def _interrupting(suffix: str) -> Callable[..., None]:
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if str(target).endswith(f"out{suffix}"):
            raise KeyboardInterrupt
        replace(source, target)

    return interrupted


def test_finished_run_is_a_no_op(prepare: Prepare, texts: list[str], tokenizer: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    arguments = (source, "--output", tmp_path / "out", "--tokenizer", tokenizer)
    assert prepare(*arguments)[0] == 0
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out.*")}
    source.touch()  # only the time differs: the hash decides
    assert prepare(*arguments)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out.*")} == times


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--format", "olmo"), "format megatron, not olmo"),
        (("--text-key", "body"), "text_key text, not body"),
        (("--eos", "Ġthen"), "eos <|endoftext|>, not Ġthen"),
        ((), "inputs that changed since"),
    ],
)
def test_other_settings_are_refused_until_overwrite(
    prepare: Prepare, texts: list[str], tokenizer: Path, tmp_path: Path, change: tuple[str, ...], named: str
) -> None:
    source = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text, "body": text[::-1]}) + "\n" for text in texts]
    source.write_text("".join(lines))
    arguments = (source, "--output", tmp_path / "out", "--tokenizer", tokenizer)
    assert prepare(*arguments)[0] == 0
    if not change:
        source.write_text("".join(lines[1:]))
    before = outputs(tmp_path / "out")
    status, printed = prepare(*arguments, *change)
    assert status == 2
    assert named in printed
    assert "--overwrite" in printed
    assert outputs(tmp_path / "out") == before
    assert prepare(*arguments, *change, "--overwrite")[0] == 0
    fresh = tmp_path / "fresh"
    assert prepare(source, "--output", fresh, "--tokenizer", tokenizer, *change)[0] == 0
    assert outputs(tmp_path / "out") == outputs(fresh)


def test_begun_run_is_not_mixed_with_other_settings(
    tokenizer: Path, texts: list[str], tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, "\ud800"])
    output = tmp_path / "out"
    begun = Settings([source], output, tokenizer=tokenizer, shard_bytes=2000)
    with pytest.raises(PolycomError, match="surrogate"):
        prepare_directly(begun)
    other = Settings(
        [source], output, tokenizer=tokenizer, shard_bytes=2000, format="olmo", on_bad_line="skip"
    )
    with pytest.raises(PolycomError, match="begun with format megatron, not olmo; add --overwrite"):
        prepare_directly(other)
    # Leaving the bad line out is no other setting: the shards that are done stay good.
    assert prepare_directly(Settings(**{**vars(begun), "on_bad_line": "skip"}))["skipped"] == 1
    with pytest.raises(PolycomError, match="without 1 bad documents, which are fatal now"):
        prepare_directly(begun)


def test_damaged_output_is_named(prepare: Prepare, texts: list[str], tokenizer: Path, tmp_path: Path) -> None:
    arguments = (
        write_jsonl(tmp_path / "a.jsonl", texts),
        "--output",
        tmp_path / "out",
        "--tokenizer",
        tokenizer,
    )
    assert prepare(*arguments)[0] == 0
    whole = outputs(tmp_path / "out")
    (tmp_path / "out.bin").write_bytes(whole[".bin"][:-2])
    status, printed = prepare(*arguments)
    assert status == 2
    assert f"{tmp_path / 'out.bin'} is missing or damaged" in printed
    assert prepare(*arguments, "--overwrite")[0] == 0
    assert outputs(tmp_path / "out") == whole


def test_other_peoples_files_are_left_alone(
    prepare: Prepare, texts: list[str], tokenizer: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.json", texts)
    content = source.read_bytes()
    status, printed = prepare(source, "--output", tmp_path / "a", "--tokenizer", tokenizer, "--overwrite")
    assert (status, "would replace an input" in printed) == (2, True)
    (tmp_path / "b.json").write_text("{}")
    status, printed = prepare(source, "--output", tmp_path / "b", "--tokenizer", tokenizer, "--overwrite")
    assert (status, "was not made by" in printed) == (2, True)
    (tmp_path / "c.bin").write_text("mine")
    status, printed = prepare(source, "--output", tmp_path / "c", "--tokenizer", tokenizer)
    assert (status, "in the way" in printed) == (2, True)
    (tmp_path / "d.tokenizer.json").write_text("mine")
    status, printed = prepare(source, "--output", tmp_path / "d", "--train-tokenizer", 300)
    assert (status, "d.tokenizer.json is in the way" in printed) == (2, True)
    (tmp_path / "e.skipped.txt").write_text("mine")
    status, printed = prepare(
        source, "--output", tmp_path / "e", "--train-tokenizer", 300, "--on-bad-line", "skip"
    )
    assert (status, "e.skipped.txt is in the way" in printed) == (2, True)
    assert (tmp_path / "e.skipped.txt").read_text() == "mine"
    assert source.read_bytes() == content
    assert (tmp_path / "b.json").read_text() == "{}"
    assert (tmp_path / "c.bin").read_text() == "mine"
    assert (tmp_path / "d.tokenizer.json").read_text() == "mine"
    assert not list(tmp_path.glob("*.work"))


def test_a_folder_of_other_peoples_work_is_left_alone(
    prepare: Prepare, texts: list[str], tokenizer: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    thesis = tmp_path / "out.work" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    status, printed = prepare(source, "--output", tmp_path / "out", "--tokenizer", tokenizer, "--overwrite")
    assert (status, f"{thesis} is in the way" in printed) == (2, True)
    assert list(thesis.parent.iterdir()) == [thesis]


def test_input_that_changes_meanwhile_is_noticed(tokenizer: Path, texts: list[str], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    settings = Settings([source], tmp_path / "out", tokenizer=tokenizer)
    make_shard = shards.make_shard

    def meanwhile(*arguments: Any) -> shards.Summary:
        with source.open("a") as file:
            file.write('{"text": "one more"}\n')
        return make_shard(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "make_shard", meanwhile)
        with pytest.raises(PolycomError, match="changed while it was read"):
            prepare_directly(settings)
    assert outputs(settings.output) == {}


def test_two_runs_do_not_share_a_prefix(texts: list[str], tokenizer: Path, tmp_path: Path) -> None:
    settings = Settings([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", tokenizer=tokenizer)
    with exclusive(settings.work), pytest.raises(PolycomError, match="another process is working"):
        prepare_directly(settings)


def test_nothing_appears_when_a_late_line_is_bad(
    prepare: Prepare, texts: list[str], tokenizer: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    source.write_text(source.read_text() + "{broken\n")
    status, printed = prepare(source, "--output", tmp_path / "out", "--tokenizer", tokenizer)
    assert status == 2
    assert f"{source}:{len(texts) + 1}: not JSON" in printed
    assert outputs(tmp_path / "out") == {}


def test_full_disk_is_one_sentence_and_the_work_goes_on_when_there_is_room(
    tokenizer: Path, texts: list[str], tmp_path: Path, disk_of: Callable[[str], Path]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts * 20)
    disk = disk_of("400k")
    output = disk / "out"
    command = [sys.executable, "-m", "polycom_ext.cli", "data", "prepare", str(source), "--workers", "2"]
    command += ["--output", str(output), "--tokenizer", str(tokenizer)]
    full = subprocess.run(command, capture_output=True, check=False)
    assert (full.returncode, full.stdout) == (2, b"")
    (line,) = full.stderr.decode().rstrip("\n").split("\n")
    assert line.rpartition("\r")[2] == (
        f"polycom data: {output}: No space left on device; make room, then the same command goes on"
    )
    assert outputs(output) == {}
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    prepare_directly(Settings([source], output, tokenizer=tokenizer))
    prepare_directly(Settings([source], tmp_path / "straight", tokenizer=tokenizer))
    assert outputs(output) == outputs(tmp_path / "straight")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("missing.jsonl", "--train-tokenizer", 300), "no file"),
        ((".", "--train-tokenizer", 300), "is a directory"),
        (("a.csv", "--train-tokenizer", 300), "unknown kind"),
        (("a.jsonl", "--train-tokenizer", 256), "vocabulary of 256 is too small"),
        (("a.jsonl", "--train-tokenizer", 70000, "--format", "olmo"), "16-bit"),
        (("a.jsonl", "--train-tokenizer", 300, "--eos", "x"), "leave --eos out"),
        (("a.jsonl", "--tokenizer", "missing.json"), "no tokenizer file"),
        (("a.jsonl", "--tokenizer", "a.jsonl"), "is not a tokenizer.json"),
        (("a.jsonl", "--train-tokenizer", 300, "--workers", 0), "--workers 0"),
        (("empty.jsonl", "--train-tokenizer", 300), "the file holds no documents"),
        (("blank.jsonl", "--train-tokenizer", 300), "1 documents are empty"),
    ],
)
def test_mistakes_get_one_sentence_and_leave_nothing(
    prepare: Prepare,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("a,b\n")
    (tmp_path / "empty.jsonl").write_text("")
    write_jsonl(tmp_path / "a.jsonl", ["some text"])
    write_jsonl(tmp_path / "blank.jsonl", [" \n "])
    before = sorted(tmp_path.iterdir())
    status, printed = prepare(*arguments, "--output", "out")
    assert status == 2
    sentence = [line for line in printed.splitlines() if line.startswith("polycom data: ")]
    assert len(sentence) == 1
    assert said in sentence[0]
    assert "Traceback" not in printed
    assert [path for path in sorted(tmp_path.iterdir()) if not path.name.startswith("out.work")] == before


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("", "--output . names no files; it is a prefix, such as train"),
        (".", "--output . names no files; it is a prefix, such as train"),
        ("/", "--output / names no files; it is a prefix, such as /train"),
        ("..", "--output .. names no files; it is a prefix, such as ../train"),
        ("folder", "folder is a directory; --output is a prefix, such as folder/train"),
        ("taken", "taken.bin is a directory, where a file would go"),
        ("file/out", "Not a directory"),
        ("/proc/out", "/proc/out"),
        ("x" * 300, "File name too long"),
        ("x" * 245, "File name too long"),  # with its suffix
    ],
)
def test_output_that_cannot_be_written_is_named(
    prepare: Prepare,
    texts: list[str],
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken.bin").mkdir()
    (tmp_path / "file").write_text("")
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    before = sorted(tmp_path.iterdir())
    status, printed = prepare(source, "--output", output, "--tokenizer", tokenizer, "--overwrite")
    assert status == 2
    (sentence,) = [line for line in printed.splitlines() if line.startswith("polycom data: ")]
    assert said in sentence
    assert "Traceback" not in printed
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_input_that_the_system_cannot_read_is_named(
    prepare: Prepare, tokenizer: Path, tmp_path: Path, kind: str
) -> None:
    unreadable = tmp_path / f"a{kind}"
    unreadable.symlink_to("/proc/self/mem")  # a file whose first bytes nobody can read
    status, printed = prepare(unreadable, "--output", tmp_path / "out", "--tokenizer", tokenizer)
    assert (status, f"{unreadable} cannot be read: Input/output error" in printed) == (2, True), printed
    with pytest.raises(PolycomError, match=f"{unreadable} cannot be read: I"):
        list(read_records(unreadable))


def test_names_that_are_not_utf8_are_names_like_others(
    texts: list[str], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    monkeypatch.chdir(folder)
    own_tokenizer = folder / os.fsdecode(b"tokenizer-\xff.json")
    own_tokenizer.write_bytes(tokenizer.read_bytes())
    inputs = [
        folder / os.fsdecode(b"\xe9" + kind) for kind in (b".jsonl", b".txt.gz", b".json.zst", b".parquet")
    ]
    lines = write_jsonl(folder / "plain", texts[:20]).read_bytes()
    inputs[0].write_bytes(lines + b"{broken\n")
    inputs[1].write_bytes(gzip.compress(b"one\n"))
    inputs[2].write_bytes(zstandard.compress(lines))
    with inputs[3].open("wb") as file:
        pq.write_table(pa.table({"text": texts[20:30]}), file)
    output = Path(os.fsdecode(b"\xe9-out"))
    settings = Settings(inputs, output, tokenizer=own_tokenizer)
    with pytest.raises(PolycomError, match=re.escape(f"{inputs[0]}:21: not JSON")):
        prepare_directly(settings)
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "polycom_ext.cli",
        "data",
        "prepare",
        *inputs,
        "--workers",
        "2",
    ]
    command += ["--output", output, "--tokenizer", own_tokenizer, "--on-bad-line", "skip"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:backslashreplace"}
    finished = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr
    assert b"\\udce9-out.bin" in finished.stdout
    skipped = output.with_name(f"{output.name}.skipped.txt").read_text()
    assert skipped.startswith(str(inputs[0]).encode("utf-8", "backslashreplace").decode() + ":21: ")
    manifest = json.loads(output.with_name(f"{output.name}.json").read_text())
    assert manifest["documents"] == 51
    assert [item["path"] for item in manifest["inputs"]] == list(map(str, inputs))
    assert manifest["tokenizer"] == str(own_tokenizer)
    model = token_files.Model(320, "", tokenizer=own_tokenizer)
    assert token_format.problem([str(output)], model) == ""
    assert prepare_directly(Settings(inputs, output, tokenizer=own_tokenizer, on_bad_line="skip")) == manifest
