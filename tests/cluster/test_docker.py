"""Images built by the project's Dockerfile, and runs in containers, on a Docker Engine of the tests' own.

No registry is asked: the base image is Debian, by debootstrap. The engine's folder, and with it the layers of
the image, is kept from one time to the next, in ~/.cache/polycom or $POLYCOM_CACHE.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from polycom_ext.upstream.download import cache_dir

from ..runs.test_training import metrics, write_spec

pytestmark = pytest.mark.cluster
TOP = Path(__file__).parents[2]
POLYCOM = [sys.executable, "-m", "polycom_ext.cli"]
BASE, IMAGE = "localhost/polycom-base", "polycom:cpu"
SITE = "docker-rehearsal"
PASSWORD = "pa55word-of-an-index"

ALPHA = r"""
FROM localhost/polycom-wheel
WORKDIR /
# As NVIDIA's containers have it: an alpha build of torch among the system's packages, and a list of versions.
RUN mv /opt/polycom/lib/python3*/site-packages /opt/torch && rm -r /opt/polycom /home/polycom /src /wheel \
    && echo /opt/torch > /usr/lib/python3/dist-packages/torch.pth \
    && mv /opt/torch/torch-*.dist-info /opt/torch/torch-2.11.0a0+x.nv26.2.dist-info \
    && sed -i 's/^Version: .*/Version: 2.11.0a0+x.nv26.02/' /opt/torch/torch-*.dist-info/METADATA \
    && mkdir /etc/pip && printf 'einops==0.8.1\nrich==13.9.3\n' > /etc/pip/constraint.txt \
    && rm -r /opt/torch/einops*
ENV PATH=/usr/bin:/bin PIP_CONSTRAINT=/etc/pip/constraint.txt
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[None]:
    """A Docker Engine, which `docker` in this process's environment reaches."""
    missing = [name for name in ("dockerd", "debootstrap") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"needs root, and Debian's docker.io and debootstrap (missing: {', '.join(missing) or 'root'})"
        )
    root = cache_dir() / "tests-of-docker"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dockerd-") as scratch, (root / "log.txt").open("wb") as log:
        address = f"unix://{scratch}/socket"
        daemon = subprocess.Popen(
            [
                *("dockerd", "--host", address, "--pidfile", f"{scratch}/pid"),
                *("--data-root", root / "data", "--exec-root", f"{scratch}/exec"),
                *("--iptables=false", "--ip6tables=false", "--bridge=none"),
            ],
            stdout=log,
            stderr=log,
        )
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("DOCKER_HOST", address)
            monkeypatch.setenv("DOCKER_BUILDKIT", "1")
            monkeypatch.setenv("PATH", "/usr/bin", prepend=os.pathsep)  # the client that came with the daemon
            try:
                deadline = time.monotonic() + 60
                while subprocess.run(["docker", "version"], capture_output=True, check=False).returncode:
                    assert daemon.poll() is None, (root / "log.txt").read_text()[-2000:]
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
                yield
            finally:
                daemon.terminate()
                daemon.wait(60)
                left = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
                under = [path for path in left if path.startswith(scratch)]
                subprocess.run(["umount", *under], capture_output=True, check=False)


def docker(*arguments: str, stdin: str = "") -> str:
    done = subprocess.run(["docker", *arguments], input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"docker {' '.join(arguments)}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def base(engine: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Debian with Python, and nothing of ours."""
    if not docker("images", "--quiet", BASE):
        root = tmp_path_factory.mktemp("debian") / "root"
        include = "--include=ca-certificates,python3,python3-venv"
        subprocess.run(
            ["debootstrap", "--variant=minbase", include, "bookworm", root], check=True, capture_output=True
        )
        subprocess.run(["sh", "-c", 'tar -C "$0" -c . | docker import - "$1"', root, BASE], check=True)
        shutil.rmtree(root)
    return BASE


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Options of `docker build`: network and pip as this machine has them, which stay out of the image."""
    folder = tmp_path_factory.mktemp("pip")
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    if listed.returncode:  # an environment without pip
        listed = subprocess.run(
            ["python3", "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
        )
    given = dict(line.split("=", 1) for line in listed.stdout.splitlines())
    values = {name.partition(".")[2]: value.strip("'") for name, value in given.items()}
    lines = [f"{key} = {values[key]}" for key in ("index-url", "trusted-host", "proxy") if key in values]
    authorities = values.get("cert", "/etc/ssl/certs/ca-certificates.crt")
    with contextlib.ExitStack() as servers:
        links = [place for place in values.get("find-links", "").split() if Path(place).is_dir()]
        served = [servers.enter_context(on_loopback(Path(place))) for place in links]
        lines += [f"find-links = {' '.join(served)}"] if served else []
        (folder / "pip.conf").write_text(
            f"# {PASSWORD}\n[global]\ncert = /run/secrets/ca\ndisable-pip-version-check = true\n"
            + "\n".join(lines)
            + "\n"
        )
        yield [
            "--network",
            "host",
            "--secret",
            f"id=pip,src={folder}/pip.conf",
            "--secret",
            f"id=ca,src={authorities}",
        ]


@contextlib.contextmanager
def on_loopback(folder: Path) -> Iterator[str]:
    """The address under which the files of a folder are to be had meanwhile."""
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def image(base: str, settings: list[str]) -> str:
    """`make image`, on that base."""
    began = time.monotonic()
    options = [f"IMAGE_BASE={base}", f"IMAGE_OPTIONS={' '.join(settings)}"]
    made = subprocess.run(["make", "-C", TOP, "image", *options], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-6000:]
    print(f"the image took {time.monotonic() - began:.0f} s")
    docker("image", "prune", "--force")
    return IMAGE


def test_an_image_says_what_it_has_is_not_roots_and_serves_whoever_runs_it(image: str) -> None:
    assert docker("run", "--rm", image, "id", "-u") == "10001\n"
    somebody = ("run", "--rm", "--network", "host", "--ipc", "host", "--user", "4321:4321", image)
    said = docker(*somebody, "polycom", "doctor")
    assert "polycom-ext works here" in said
    assert "fused: polyrelu, polynorm" in said
    assert "upstream megatron       0.17.1: applied" in said
    assert docker(*somebody, "sh", "-c", 'touch "$HOME/mine" && echo "$HOME"') == "/home/polycom\n"


def test_no_layer_holds_what_the_build_was_told_in_confidence(image: str) -> None:
    looked = subprocess.run(
        ["bash", "-o", "pipefail", "-c", 'docker save "$0" | grep --text --count "$1"', image, PASSWORD],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (looked.stdout, looked.stderr) == ("0\n", "")
    assert PASSWORD not in docker("history", "--no-trunc", image)
    left = "ls -A /run/secrets 2>/dev/null; python3 -m pip config list"
    assert docker("run", "--rm", image, "sh", "-c", left) == ""


@pytest.fixture(scope="module")
def build_on_alpha(image: str, settings: list[str]) -> Callable[[str], str]:
    """Build a GPU's target on a stand-in of NVIDIA's container, without CUDA; the image's name."""

    def build(tag: str, target: str, base: str, *options: str) -> str:
        about = ["--tag", tag, "--target", target, "--build-arg", f"BASE={base}", *options, *settings]
        docker("build", "--file", f"{TOP}/docker/Dockerfile", *about, str(TOP))
        return tag

    build("localhost/polycom-wheel", "cpu-wheel", BASE)  # which has a compiler, as NVIDIA's have
    docker("build", "--network", "host", "--tag", "localhost/alpha", "-", stdin=ALPHA)
    return lambda target: build(
        f"polycom:alpha-{target}", target, "localhost/alpha", "--build-arg", "POLYCOM_BUILD_CUDA=0"
    )


@pytest.mark.parametrize(
    ("target", "listed"),
    [("megatron", "einops 0.8.1"), pytest.param("olmo", "rich 13.9.3", marks=pytest.mark.long)],
)
def test_a_containers_alpha_torch_and_its_list_of_versions_survive_the_installation(
    build_on_alpha: Callable[[str], str], target: str, listed: str
) -> None:
    script = """if True:
        import sys, torch, polycom_ext
        from importlib.metadata import version
        y = polycom_ext.PolyNorm()(torch.ones(2, 8))
        print(version("torch"), torch.__file__, sys.argv[1], version(sys.argv[1]), y.shape)
    """
    image = build_on_alpha(target)
    said = docker("run", "--rm", image, "python3", "-c", script, listed.split()[0])
    assert said == f"2.11.0a0+x.nv26.02 /opt/torch/torch/__init__.py {listed} torch.Size([2, 8])\n"


def write_site(folder: Path, **container: Any) -> str:
    """This machine as two nodes, as the shipped site has it, but for this of the container."""
    site = {"extends": "docker-rehearsal.yaml", "container": container}
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(site))
    return str(path)


def run(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*POLYCOM, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )


def containers() -> list[str]:
    return docker("ps", "--all", "--format", "{{.Names}}").split()


def test_two_containers_as_two_nodes_train_to_the_losses_of_a_plain_run(image: str, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "base-dense.yaml", "polynorm", train_iters=4)
    plain = run("run", spec, "--output", "plain", "--processes-per-node", "2", folder=tmp_path)
    assert plain.returncode == 0, plain.stderr
    two = run("run", spec, "--output", "two", "--nodes", "2", "--site", SITE, folder=tmp_path)
    assert two.returncode == 0, two.stdout + two.stderr
    assert containers() == []
    assert len(metrics(tmp_path / "plain")) == 4
    assert metrics(tmp_path / "two") == metrics(tmp_path / "plain")
    [attempt] = json.loads((tmp_path / "two" / "versions.json").read_text())["attempts"]
    assert attempt["complete"]
    assert (tmp_path / "two" / "log.txt").stat().st_uid == os.getuid()


def test_a_run_that_is_stopped_leaves_no_container(image: str, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "base-dense.yaml", "polynorm", train_iters=5000, save_interval=5000)
    command = [*POLYCOM, "run", str(spec), "--output", "two", "--nodes", "2", "--site", SITE]
    submitted = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        metrics_file = tmp_path / "two" / "metrics.jsonl"
        deadline = time.monotonic() + 180
        while not metrics_file.is_file():
            assert submitted.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert len(containers()) == 2
        stopped = run("stop", "two", folder=tmp_path)
        assert stopped.returncode == 0, stopped.stderr
        said, _ = submitted.communicate(timeout=120)
        assert submitted.returncode == 128 + signal.SIGTERM, said
    finally:
        submitted.kill()
    assert containers() == []
    assert "does not run" in run("stop", "two", folder=tmp_path).stdout


@pytest.mark.parametrize(
    ("environment", "about", "sentence"),
    [
        ({"PATH": "{folder}/without-docker"}, {}, "it has no docker"),
        ({"DOCKER_HOST": "unix:///nowhere"}, {}, "its docker does not answer"),
        ({}, {"image": "localhost/no-such-image"}, "the image localhost/no-such-image is not there"),
    ],
)
def test_what_stands_in_the_way_is_said_in_one_sentence_before_anything_starts(
    image: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    about: dict[str, str],
    sentence: str,
) -> None:
    spec = write_spec(tmp_path, "base-dense.yaml", "polynorm")
    (tmp_path / "without-docker").mkdir()
    for program in ("bash", "setsid"):
        (tmp_path / "without-docker" / program).symlink_to(shutil.which(program) or program)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(folder=tmp_path))
    refused = run("run", spec, "--nodes", "2", "--site", write_site(tmp_path, **about), folder=tmp_path)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert sentence in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_what_the_engine_refuses_is_no_failure_that_a_restart_could_mend(image: str, tmp_path: Path) -> None:
    spec, device = write_spec(tmp_path, "base-dense.yaml", "polynorm"), "--device=/dev/no-such-device"
    refused = run("run", spec, "--site", write_site(tmp_path, options=[device]), folder=tmp_path)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "/dev/no-such-device" in refused.stderr
    assert containers() == []
