"""The nodes of a run in real containers of podman's; their image is empty, and all that runs is mounted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..runs.conftest import THIRD_PARTY, register
from ..runs.conftest import write_spec as write_toy
from ..runs.test_training import metrics

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.long,  # one more engine to install, of a machine that has docker
    pytest.mark.skipif(
        os.geteuid() != 0 or None in (shutil.which("podman"), shutil.which("runc")),
        reason="needs root, and Debian's podman and runc",
    ),
]
TOP = Path(__file__).parents[2]
POLYCOM = [sys.executable, "-m", "polycom_ext.cli"]
IMAGE = "localhost/empty"
NEEDED = {TOP, Path("/usr"), *map(Path, (sys.base_prefix, sys.prefix, *sys.path))}
"""What runs lies there: the folders that no other one of them holds are mounted."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An image without a file, in a store of the tests' own; limits that an unprivileged machine allows."""
    folder = tmp_path_factory.mktemp("podman")
    store = f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/root"\nrunroot = "{folder}/run"\n'
    (folder / "storage.conf").write_text(store)
    (folder / "containers.conf").write_text(
        '[containers]\ndefault_ulimits = ["nofile=1000:1000", "nproc=1000:1000"]\n'
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("CONTAINERS_CONF", str(folder / "containers.conf"))
        monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(folder / "storage.conf"))
        with tarfile.open(folder / "empty.tar", "w") as archive:
            for name in ("bin", "lib", "lib64", "sbin"):
                link = tarfile.TarInfo(name)
                link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
                archive.addfile(link)
            for name in ("etc", "proc", "sys", "dev", "tmp"):
                directory = tarfile.TarInfo(name)
                directory.type, directory.mode = tarfile.DIRTYPE, 0o1777
                archive.addfile(directory)
            for name in ("passwd", "group"):
                archive.add(f"/etc/{name}", f"etc/{name}")
        podman("import", str(folder / "empty.tar"), IMAGE)
        yield IMAGE
        podman("rmi", "--force", IMAGE)


def podman(*arguments: str) -> str:
    ended = subprocess.run(["podman", *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def containers() -> list[str]:
    return podman("ps", "--all", "--format", "{{.Names}}").split()


@pytest.fixture
def start(image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start a run of the toy trainer on two nodes, which are containers here."""
    register(monkeypatch, tmp_path)
    places = sorted(path for path in NEEDED if path.is_dir())
    mounts = [path for path in places if not set(path.parents) & set(places)]
    container = {
        "engine": "podman",
        "image": image,
        "mounts": [f"{path}:{path}:ro" for path in mounts],
        "off": ["gpus", "infiniband", "limits"],
        "options": [f"--env=PATH={Path(sys.executable).parent}:/usr/bin", f"--env=PYTHONPATH={THIRD_PARTY}"],
    }
    site = {"backend": "docker", "hosts": ["localhost", "localhost"], "container": container}
    Path("site.yaml").write_text(yaml.safe_dump(site))

    def begin(**options: Any) -> subprocess.Popen[str]:
        spec = write_toy("small", 1, options)
        command = [*POLYCOM, "run", spec, "--nodes", "2", "--site", "site.yaml"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return begin


def test_two_containers_are_the_nodes_of_a_run_and_leave_nothing(start: Any) -> None:
    submitted = start(steps=3)
    said, _ = submitted.communicate(timeout=240)
    assert submitted.returncode == 0, said
    assert sorted(metrics(Path("outputs/small"))) == [1, 2, 3]
    assert containers() == []


def test_a_run_that_is_stopped_ends_in_its_containers_too(start: Any) -> None:
    submitted = start(steps=5000, seconds=0.05, helper=300)
    try:
        deadline = time.monotonic() + 180
        while not Path("outputs/small/metrics.jsonl").is_file():
            assert submitted.poll() is None, submitted.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert len(containers()) == 2
        stop = [*POLYCOM, "stop", "outputs/small"]
        assert subprocess.run(stop, check=False, capture_output=True, timeout=120).returncode == 0
        said, _ = submitted.communicate(timeout=120)
        assert submitted.returncode == 128 + signal.SIGTERM, said
    finally:
        submitted.kill()
    assert containers() == []


def test_a_node_whose_engine_fails_keeps_the_other_one_waiting_no_longer(start: Any) -> None:
    site = yaml.safe_load(Path("site.yaml").read_text())
    site["setup"] = ['[ "$POLYCOM_NODE_RANK" = 0 ] || export CONTAINERS_STORAGE_CONF=/nowhere']
    Path("site.yaml").write_text(yaml.safe_dump({**site, "max_restarts": 0}))
    submitted = start(steps=3)
    said, _ = submitted.communicate(timeout=240)
    assert submitted.returncode == 1, said
    assert "small: node 1 does not come: " in said
    assert containers() == []
