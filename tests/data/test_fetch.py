"""`polycom data fetch` and `verify`: the paper's corpora, from hosts that stand in for theirs."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer

from polycom_ext.cli import main
from polycom_ext.data import recipe as recipes
from polycom_ext.data.download import Downloads, Remote
from polycom_ext.data.sources import document_text, read_records
from polycom_ext.errors import PolycomError
from polycom_ext.files import sha256
from polycom_ext.integrations.megatron import tokens
from polycom_ext.integrations.megatron.token_format import HEADER
from polycom_ext.runs.adapter import find
from polycom_ext.runs.spec import load_each

from . import stand_in
from .stand_in import TOGETHER, Hosts

CONFIGS = Path(__file__).parents[2] / "configs"
REDPAJAMA, OLMOE = Path("data/redpajama-1t"), Path("data/olmoe-mix-0924")
WIKI = f"https://{TOGETHER}/wikipedia/wiki.jsonl"
SUMS = f"https://{TOGETHER}/sha256/wikipedia_SHA256SUMS.txt"
Fetch = Callable[..., tuple[int, str]]
Own = Callable[..., Path]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    stand_in.build(folder, texts, tokenizer)
    return folder


@pytest.fixture
def hosts(root: Path) -> Iterator[Hosts]:
    with Hosts(root) as served:
        yield served
        served.shutdown()


@pytest.fixture
def fetch(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Fetch:
    """`polycom data VERB ARGUMENTS` in an empty folder, the stand-ins as mirror: status and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def run(*arguments: object, verb: str = "fetch") -> tuple[int, str]:
        words = [str(word) for word in arguments]
        if verb == "fetch":
            words += [] if "--mirror" in words else ["--mirror", hosts.url]
            words += [] if "--workers" in words else ["--workers", "2"]
        capsys.readouterr()
        status = main(["data", verb, *words])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


@pytest.fixture(scope="module")
def published(root: Path) -> dict[str, bytes]:
    """What is there before anybody has fetched anything."""
    return contents(root)


@pytest.fixture(scope="module")
def straight(root: Path, published: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which both corpora were made without a hitch, from hosts and from a folder."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch, Hosts(root) as hosts:
        patch.chdir(folder)
        for words, mirror in (
            (["redpajama-1t"], root),
            (["olmoe-mix-0924"], hosts.url),
            (["olmoe-mix-0924", "--format", "megatron"], root),
        ):
            assert main(["data", "fetch", *words, "--mirror", str(mirror), "--workers", "2"]) == 0
        hosts.shutdown()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of all that was made, without locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock") and ".claims" not in path.parts
    }


def texts_of(path: Path) -> list[str]:
    return [document_text(record) for record in read_records(path)]


def test_every_file_becomes_a_data_set_of_its_documents(root: Path, straight: Path) -> None:
    folder = straight / REDPAJAMA
    encode = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = encode.token_to_id("</s>")
    for source, names in stand_in.REDPAJAMA.items():
        for index, name in enumerate(names):
            split = "valid" if len(names) > 1 and index == len(names) - 1 else "train"
            stored = np.fromfile(folder / split / f"{source}-{index:05d}.bin", dtype="<u2")
            expected = [[*encode.encode(text).ids, end] for text in texts_of(root / TOGETHER / name)]
            assert stored.tolist() == [id_ for ids in expected for id_ in ids]
    assert not (folder / "raw").exists(), "thrown away once its tokens are there"


def test_the_configs_read_what_the_recipes_make(straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(straight)
    for name in ("dense-1b/table-1", "moe-1b-7b/megatron"):
        for spec in load_each(CONFIGS / f"{name}.yaml"):
            tokens.check(spec)
    for spec in load_each(CONFIGS / "moe-1b-7b/olmo.yaml"):
        listed = spec.options["evaluators"][0]["data"]["datasets"]
        assert {label.removesuffix("-validation") for label in listed} == {
            *recipes.load("olmoe-mix-0924").validation.sets
        }
        find("olmo").check_inputs(spec)


def test_the_mixture_has_each_source_as_often_as_is_published(straight: Path) -> None:
    blend = json.loads((straight / REDPAJAMA / "blend.json").read_text())
    said = recipes.load("redpajama-1t").train
    total = sum(source.tokens for source in said.values())
    weights = dict(zip(blend["train"][1::2], map(float, blend["train"][::2]), strict=True))
    for label, source in said.items():
        of_source = sum(
            weight for prefix, weight in weights.items() if Path(prefix).name.startswith(f"{label}-")
        )
        assert of_source == pytest.approx(source.tokens / total, rel=1e-6)
    assert {Path(prefix).name for prefix in blend["valid"][1::2]} == {
        f"{label}-00001" for label, source in said.items() if source.held_out
    }


def test_validation_sets_keep_their_tokens_in_every_form(root: Path, straight: Path) -> None:
    for label, url in recipes.load("olmoe-mix-0924").validation.sets.items():
        published = (root / url.partition("://")[2]).read_bytes()
        assert (straight / OLMOE / f"validation/{label}.npy").read_bytes() == published
        assert (straight / OLMOE / f"megatron/validation/{label}.bin").read_bytes() == published
        index = (straight / OLMOE / f"megatron/validation/{label}.idx").read_bytes()
        ends = np.flatnonzero(np.frombuffer(published, dtype="<u2") == 0) + 1
        lengths = np.frombuffer(index, dtype="<i4", offset=HEADER.size, count=len(ends))
        assert lengths.tolist() == np.diff(ends, prepend=0).tolist()
        assert len(ends) == int.from_bytes(index[18:26], "little") > 0


def test_hosts_and_a_folder_that_mirrors_them_give_the_same_tokens(
    root: Path, published: dict[str, bytes], straight: Path
) -> None:
    names = [path.stem for path in (straight / OLMOE / "train").glob("*.npy")]
    assert len(names) == sum(map(len, stand_in.OLMOE.values())) - 1, "all but one that no pattern takes"
    for name in names:
        fetched = (straight / OLMOE / f"train/{name}.npy").read_bytes()
        assert (straight / OLMOE / f"megatron/train/{name}.bin").read_bytes() == fetched
    assert {name: content for name, content in contents(root).items() if ".example" not in name} == published


def test_what_is_there_is_not_fetched_again(fetch: Fetch, hosts: Hosts, straight: Path) -> None:
    for folder in (REDPAJAMA, OLMOE):
        shutil.copytree(straight / folder, folder)
        assert fetch(folder.name)[0] == 0
    assert not hosts.asked
    (REDPAJAMA / "train/c4-00000.bin").write_bytes(b"torn")
    assert fetch("redpajama-1t")[0] == 0
    assert [path for _, path, *_ in hosts.asked] == [f"/{TOGETHER}/c4/c4-train.00000-of-01024.jsonl"]
    made, right = contents(REDPAJAMA), contents(straight / REDPAJAMA)
    assert {name for name in right if made[name] != right[name]} == {"train/c4-00000.json"}, (
        "its raw file's path"
    )


def test_a_damaged_download_is_fetched_again_and_not_used(
    fetch: Fetch, hosts: Hosts, own: Own, straight: Path
) -> None:
    hosts.damaged["wiki.jsonl"] = 2
    tokenizer = straight / REDPAJAMA / "tokenizer.json"
    recipe = own(WIKI, source={"sha256": SUMS})
    assert fetch(recipe, "--output", "out", "--tokenizer", tokenizer, "--keep-raw")[0] == 0
    assert len(hosts.ranges("wiki.jsonl")) == 3
    right = straight / REDPAJAMA / "train/wikipedia-00000.bin"
    assert Path("out/train/all-00000.bin").read_bytes() == right.read_bytes()
    hosts.damaged["wiki.jsonl"] = 100
    status, printed = fetch(recipe, "--output", "other", "--tokenizer", tokenizer)
    assert (status, f"{WIKI} has sha256 " in printed) == (2, True), printed
    assert not list(Path("other").rglob("all-*.*"))
    assert not Path("other/blend.json").exists()


def test_the_token_goes_to_the_hub_and_nowhere_else(
    fetch: Fetch, hosts: Hosts, own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch(own(WIKI), "--output", "out")[0] == 0
    shown = {path for _, path, _, authorization in hosts.asked if authorization}
    assert shown == {"/huggingface.co/allenai/gpt-neox-olmo-dolma-v1_5/resolve/main/tokenizer.json"}


def test_nodes_take_their_shares_and_the_last_one_mixes(
    fetch: Fetch, own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = own(WIKI, f"https://{TOGETHER}/c4/c4-train.00000-of-01024.jsonl")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    for node, there in (("1", False), ("0", True)):
        monkeypatch.setenv("SLURM_PROCID", node)
        status, printed = fetch(recipe, "--output", "out")
        assert (status, "1 files are left to other nodes" in printed) == (0, not there)
        assert Path("out/blend.json").exists() == there
        made = {path.stem for path in Path("out/train").glob("*.bin")}
        assert made == ({"all-00000", "all-00001"} if there else {"all-00001"})


def test_a_batch_script_of_slurm_is_alone_until_it_calls_srun(
    fetch: Fetch, own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Slurm 22.05 sets in a script of two tasks, and no more."""
    for name, value in {"SLURM_PROCID": 0, "SLURM_NODEID": 0, "SLURM_NTASKS": 2, "SLURM_NPROCS": 2}.items():
        monkeypatch.setenv(name, str(value))
    status, printed = fetch(
        own(WIKI, f"https://{TOGETHER}/c4/c4-train.00000-of-01024.jsonl"), "--output", "out"
    )
    assert (status, "left to other nodes" in printed) == (0, False)
    assert Path("out/blend.json").exists()


def test_a_download_goes_on_where_it_broke_off(hosts: Hosts, root: Path, tmp_path: Path) -> None:
    path = root / WIKI.partition("://")[2]
    hosts.cut["wiki.jsonl"], hosts.busy["wiki.jsonl"] = 2, 1
    got = Downloads(tmp_path, hosts.url, pause=0.0).get(Remote(WIKI, path.stat().st_size, sha256(path)))
    assert got.read_bytes() == path.read_bytes()
    half = path.stat().st_size // 2
    rest = half + (path.stat().st_size - half) // 2
    assert hosts.ranges("wiki.jsonl") == [None, None, f"bytes={half}-", f"bytes={rest}-"]


def test_a_file_that_changed_meanwhile_is_not_pieced_together(
    hosts: Hosts, root: Path, tmp_path: Path
) -> None:
    path = root / "elsewhere.example/changing.txt"
    path.parent.mkdir()
    path.write_bytes(b"old " * 1000)
    hosts.cut["changing.txt"], hosts.changes["changing.txt"] = 1, b"new!" * 1000
    got = Downloads(tmp_path, hosts.url, pause=0.0).get(Remote("https://elsewhere.example/changing.txt"))
    assert got.read_bytes() == b"new!" * 1000


def test_a_download_that_is_damaged_here_is_fetched_again(hosts: Hosts, tmp_path: Path) -> None:
    downloads = Downloads(tmp_path, hosts.url)
    path = downloads.get(Remote(WIKI))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"?")
    assert downloads.get(Remote(WIKI)).read_bytes() == whole
    assert downloads.get(Remote(WIKI)).read_bytes() == whole
    assert len(hosts.ranges("wiki.jsonl")) == 2


def test_without_published_hashes_a_damaged_archive_is_fetched_again(
    fetch: Fetch, hosts: Hosts, own: Own
) -> None:
    hosts.damaged["arxiv-0000.json.gz"] = 1
    path = "huggingface.co/datasets/allenai/OLMoE-mix-0924/resolve/2ccd259c2b3593b8960fb1b27ad65d5cb65e211c"
    recipe = own(f"https://{path}/data/arxiv/arxiv-0000.json.gz")
    assert fetch(recipe, "--output", "out")[0] == 0
    assert len(hosts.ranges("arxiv-0000.json.gz")) == 2
    hosts.damaged["arxiv-0000.json.gz"] = 2
    status, printed = fetch(recipe, "--output", "other")
    assert (status, "is damaged or not gzip" in printed) == (2, True), printed


@pytest.fixture
def own(root: Path, tmp_path: Path) -> Own:
    """A recipe of one's own, of some URLs."""

    def write(*urls: str, **changes: Any) -> Path:
        listed = root / "mine.example/urls.txt"
        listed.parent.mkdir(exist_ok=True)
        listed.write_text("".join(f"{url}\n" for url in urls))
        source = {"urls": "https://mine.example/urls.txt", "match": "*", "tokens": 1000.0}
        said = {
            "name": "mine",
            "formats": ["megatron"],
            "tokenizer": {"hub": "allenai/gpt-neox-olmo-dolma-v1_5"},
            "train": {"all": {**source, **changes.pop("source", {})}},
            **changes,
        }
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(said))
        return path

    return write


def test_tokens_are_compared_with_those_published(fetch: Fetch, own: Own) -> None:
    recipe = own(WIKI)
    status, printed = fetch(recipe, "--output", "out", verb="verify")
    assert (status, "files.json is not there" in printed) == (2, True)
    assert fetch(recipe, "--output", "out")[0] == 0
    made = json.loads(Path("out/train/all-00000.json").read_text())["tokens"]
    status, printed = fetch(recipe, "--output", "out", verb="verify")
    assert (status, f"all has {made} tokens" in printed) == (2, True)
    right = own(WIKI, source={"tokens": made * 1.05, "files": 1})
    status, printed = fetch(right, "--output", "out", verb="verify")
    assert (status, f"{made} tokens, -4.8% from those published" in printed) == (0, True)
    status, printed = fetch(own(WIKI, source={"tokens": made, "files": 2}), "--output", "out", verb="verify")
    assert (status, "all has 1 files, but 2 are published" in printed) == (2, True)
    Path("out/train/all-00000.bin").write_bytes(b"")
    status, printed = fetch(right, "--output", "out", verb="verify")
    assert (status, "1 of 1 files of all in out are not made yet, or damaged" in printed) == (2, True)


def test_a_proxy_is_honoured(
    hosts: Hosts, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", hosts.url)
    path = root / WIKI.partition("://")[2]
    got = Downloads(tmp_path, "http://corpora.invalid").get(Remote(WIKI, path.stat().st_size))
    assert got.read_bytes() == path.read_bytes()


def test_a_share_is_spread_over_the_files_and_keeps_those_held_out(fetch: Fetch, own: Own) -> None:
    urls = [
        f"https://{TOGETHER}/{name}"
        for names in stand_in.REDPAJAMA.values()
        for name in names
        if "zst" not in name
    ]
    recipe = own(*urls, source={"held_out": 1})
    assert fetch(recipe, "--output", "out", "--share", 0.5)[0] == 0
    made = sorted(path.stem for path in Path("out").glob("*/*.bin"))
    assert made == ["all-00000", "all-00001", "all-00003", "all-00005", "all-00007"]
    assert [path.stem for path in Path("out/valid").glob("*.bin")] == ["all-00007"]
    status, printed = fetch(recipe, "--output", "out")
    assert (status, "files.json is of share 0.5, not 1.0" in printed) == (2, True)


def test_a_disk_without_room_is_told_before_the_first_byte(
    fetch: Fetch, hosts: Hosts, disk_of: Callable[[str], Path]
) -> None:
    disk = disk_of("100k")
    status, printed = fetch("redpajama-1t", "--output", disk / "out")
    assert (status, "its disk has 0.0 GB; make room" in printed) == (2, True), printed
    assert {method for method, path, *_ in hosts.asked if path.endswith(".jsonl")} == {"HEAD"}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_kills_at_random_moments_give_the_same_bytes(
    hosts: Hosts, straight: Path, tmp_path: Path, kills: int
) -> None:
    command = [
        sys.executable,
        "-m",
        "polycom_ext.cli",
        "data",
        "fetch",
        "redpajama-1t",
        "--mirror",
        hosts.url,
    ]
    command += ["--workers", "2"]

    def whole(folder: Path) -> dict[str, bytes]:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return contents(folder / REDPAJAMA)

    right = contents(straight / REDPAJAMA)
    manifests = {name for name in right if name.startswith(("train/", "valid/")) and name.endswith(".json")}
    if kills > 3:  # manifests too, which name raw files
        (tmp_path / "straight").mkdir()
        right, manifests = whole(tmp_path / "straight"), set()
    done, rounds = 0, 0
    while done < kills:
        folder = tmp_path / str(rounds)
        folder.mkdir()
        while done < kills and _is_killed(command, folder, hosts):
            done += 1
        made = whole(folder)
        assert made.keys() == right.keys()
        assert [name for name in right if name not in manifests and made[name] != right[name]] == []
        rounds += 1


def _is_killed(command: list[str], folder: Path, hosts: Hosts) -> bool:
    """Start it, and kill it after its first request, mostly one for a text, if it has not ended by then."""
    first = "" if random.random() < 0.2 else ".jsonl"
    hosts.pause, before, quiet = 0.05, len(hosts.asked), subprocess.DEVNULL

    def has_begun() -> bool:
        asked = [path for method, path, *_ in hosts.asked[before:] if method == "GET"]
        return any(first in path for path in asked)

    with subprocess.Popen(command, cwd=folder, stdout=quiet, stderr=quiet) as process:
        while process.poll() is None and not has_begun():
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.6))
        hosts.pause = 0.0
        if process.poll() is not None:
            return False
        process.send_signal(signal.SIGKILL)
    return True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("redpajama",), "no recipe redpajama (did you mean 'redpajama-1t'?)"),
        (("redpajama-1t", "--workers", 0), "--workers 0 is too few"),
        (("redpajama-1t", "--tokenizer", "missing.json"), "no tokenizer file missing.json"),
        (("redpajama-1t", "--mirror", "/nowhere"), "is not there; a mirror has HOST/PATH of each file"),
        (("redpajama-1t", "--mirror", "HOSTS/elsewhere"), "_SHA256SUMS.txt is not there (status 404)"),
        (("bad.yaml",), "bad.yaml: train.a: unknown key toknes (did you mean 'tokens'?)"),
    ],
)
def test_mistakes_get_one_sentence(fetch: Fetch, hosts: Hosts, words: tuple[object, ...], said: str) -> None:
    source = {"urls": "https://a.example/urls.txt", "match": "*", "toknes": 1.0}
    Path("bad.yaml").write_text(
        yaml.safe_dump(
            {"name": "a", "formats": ["olmo"], "tokenizer": {"hub": "a/b"}, "train": {"a": source}}
        )
    )
    status, printed = fetch(*(str(word).replace("HOSTS", hosts.url) for word in words))
    assert (status, said in printed) == (2, True), printed
    assert "Traceback" not in printed


def test_another_tokenizer_is_not_mixed_in(fetch: Fetch, own: Own, tokenizer: Path) -> None:
    recipe = own(WIKI)
    assert fetch(recipe, "--output", "out", "--tokenizer", tokenizer)[0] == 0
    other = Path("other.json")
    other.write_text(tokenizer.read_text() + "\n")
    status, printed = fetch(recipe, "--output", "out", "--tokenizer", other)
    assert (status, "out was begun with another tokenizer than other.json" in printed) == (2, True)


def test_a_host_that_cannot_be_reached_is_told(tmp_path: Path) -> None:
    with pytest.raises(PolycomError, match=r"cannot be fetched .* give the same command again to go on"):
        Downloads(tmp_path, "http://127.0.0.1:9", pause=0.0).get(Remote(WIKI))
    assert not list(tmp_path.rglob("wiki.jsonl"))


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("train", "tokens", "many", "train.a: tokens 'many' is not a number, 0 or more"),
        ("train", "tokens", 0, "train.a: tokens 0 gives it no part of the mixture"),
        ("train", "weight", -1, "train.a: weight -1 is not a number, 0 or more"),
        ("train", "weight", float("nan"), "train.a: weight nan is not a number, 0 or more"),
        ("train", "held_out", [1], "train.a: held_out [1] is not a whole number, 0 or more"),
        ("train", "held_out", True, "train.a: held_out True is not a whole number, 0 or more"),
        ("train", "match", None, "train.a: match None is not a text"),
        ("train", "hub", "a/b", "train.a needs one of urls and hub"),
        ("validation", "sets", 3, "validation: sets 3 is not a mapping of texts"),
        ("validation", "sets", {"../up": "https://a"}, "'../up' must be a plain name of a file"),
        ("validation", "dtype", "float", "validation.dtype float is none of uint16, uint32"),
        ("tokenizer", "hub", 3, "tokenizer: hub 3 is not a text"),
        ("", "within", "x", "within 'x' is not a number, 0 or more"),
        ("", "formats", "olmo", "formats 'olmo' is not a list of texts"),
        ("", "formats", [], "formats names no form of token files"),
        ("", "formats", ["elmo"], "formats: elmo is none of"),
        ("", "name", "../up", "'../up' must be a plain name of a file"),
        ("", "train", {}, "train names no source"),
        ("", "train", None, "train is no mapping of names"),
        ("", "tokenizer", None, "tokenizer is no mapping of names"),
        ("", "formats", None, "formats None is not a list of texts"),
    ],
)
def test_a_recipe_of_wrong_values_is_refused_in_a_sentence(
    tmp_path: Path, part: str, key: str, value: object, said: str
) -> None:
    source: dict[str, object] = {"urls": "https://a.example/urls.txt", "match": "*", "tokens": 1.0}
    recipe: dict[str, object] = {
        "name": "a",
        "formats": ["olmo"],
        "tokenizer": {"hub": "a/b"},
        "train": {"a": source},
        "validation": {"sets": {"b": "https://a.example/b.npy"}},
    }
    changed = {"": recipe, "train": source}.get(part) or recipe[part]
    assert isinstance(changed, dict)
    changed[key] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(PolycomError) as refused:
        recipes.load(str(path))
    assert said in str(refused.value)


def test_what_a_recipe_needs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\ntokenizer: {hub: a/b}\ntrain: {a: {hub: a/b, match: '*'}}\n")
    with pytest.raises(PolycomError, match=r"train\.a: tokens is missing"):
        recipes.load(str(path))
