"""A site file: what it may say, where it is found, and what of it a run's record keeps."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from polycom_ext import shipped
from polycom_ext.cli import main
from polycom_ext.errors import PolycomError
from polycom_ext.runs import backends, document
from polycom_ext.runs import site as sites
from polycom_ext.runs.backends.rendering import fill, shell
from polycom_ext.runs.record import Record

from . import hostile

SHIPPED = sorted((shipped.folder("launch") / "sites").glob("*.yaml"))
TOP = Path(__file__).parents[2]
WHOLE: dict[str, Any] = {
    "backend": "slurm",
    "container": {"engine": "pyxis", "image": "a/b:c", "mounts": ["/data"], "options": ["--x"]},
    "environment": {"NCCL_IB_HCA": "mlx5", "COUNT": "010"},
    "hosts": ["gpu-01", "me@gpu-02"],
    "ssh_options": ["-p", "2222"],
    "slurm": {"partition": "a100", "exclusive": True},
    "kubernetes": {"namespace": "me"},
    "max_restarts": 0,
    "preflight": {"disk": "50G"},
}


def write(folder: Path, name: str = "site.yaml", **content: Any) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(content))
    return path


def test_what_a_record_keeps_is_read_back_as_the_same_site(tmp_path: Path) -> None:
    site = sites.load(write(tmp_path, **WHOLE))
    (tmp_path / "again.yaml").write_text(document.dump(site.as_mapping()))
    assert sites.load(tmp_path / "again.yaml") == site
    assert site.max_restarts == 0
    assert sites.load(write(tmp_path, "empty.yaml")) == sites.Site()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_site_is_found_by_its_name_and_names_a_backend(path: Path) -> None:
    assert sites.find(path.stem) == path
    assert sites.load(path).backend in backends.BACKENDS


def test_a_site_extends_one_beside_it_or_a_shipped_one(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml", extends="slurm-a100.yaml", slurm={"account": "me", "mem": None})
    site = sites.load(write(tmp_path, extends="mine.yaml", environment={"NCCL_IB_TIMEOUT": 18}))
    assert site.slurm["account"] == "me"
    assert "mem" not in site.slurm
    assert site.slurm["gpus-per-node"] == 8
    assert site.environment["NCCL_IB_TIMEOUT"] == "18"
    assert site.environment["NCCL_IB_HCA"] == "mlx5"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"partition": "a100"}, "unknown key 'partition'"),
        ({"contaner": {}}, "unknown key 'contaner' (did you mean 'container'?)"),
        ({"container": {"image": "x", "engine": "pixis"}}, "unknown engine 'pixis' (did you mean 'pyxis'?)"),
        ({"container": {"engine": "docker"}}, "container has no `image:`"),
        (
            {"container": {"image": "x", "mount": []}},
            "container: unknown key 'mount' (did you mean 'mounts'?)",
        ),
        ({"setup": "module load x"}, "setup must be a list of texts, not 'module load x'"),
        ({"hosts": ["-oProxyCommand=x"]}, "hosts: '-oProxyCommand=x' is no [USER@]HOST"),
        ({"max_restarts": -1}, "max_restarts must be an integer of at least 0, not -1"),
        ({"environment": {"A B": 1}}, "environment: 'A B' is no name of a variable"),
        ({"setup": ["export HF_TOKEN=hf_abc"]}, "setup holds HF_TOKEN, which looks like a secret"),
        ({"container": {"image": "x", "options": ["--env=API_KEY=abc"]}}, "container.options holds API_KEY"),
        ({"slurm": {"comment": "https://me:pw@proxy"}}, "slurm.comment holds a login in an address"),
    ],
)
def test_a_mistake_in_a_site_is_one_sentence(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(PolycomError) as caught:
        sites.load(write(tmp_path, **changes))
    assert str(caught.value).startswith(f"{tmp_path}/site.yaml")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--site", "slurm-a10"], "unknown site 'slurm-a10' (did you mean 'slurm-a100'?)"),
        (["--site", "nowhere.yaml"], "site file nowhere.yaml does not exist"),
        (["--backend", "slrum"], "unknown backend 'slrum' (did you mean 'slurm'?)"),
        (["--nodes", "two"], "nodes must be an integer of at least 1, not 'two'"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(
    toy_spec: Callable[..., str], options: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", toy_spec(steps=1), *options]) == 2
    assert sentence in capfd.readouterr().err
    assert not Path("outputs").exists()


def test_a_secret_may_be_taken_from_a_file_by_the_setup(tmp_path: Path) -> None:
    setup = ['export HF_TOKEN=$(cat ~/.hf-token) WANDB_API_KEY="$(cat ~/.wandb)"']
    assert sites.load(write(tmp_path, setup=setup)).setup == tuple(setup)


def test_a_sites_variables_and_setup_reach_a_local_run_beneath_the_specs_own(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    here = write(
        Path(),
        environment={"TOY_SPEC": "the site's", "TOY_API_KEY": "hunter2"},
        setup=["export SET_UP='by the \"site\"'"],
    )
    assert main(["run", toy_spec(steps=1, talk="hello"), "--site", str(here)]) == 0
    record = Record(Path("outputs/small"))
    assert "the key is 7 long" in record.log.read_text()
    assert "export TOY_SPEC='a b'" in record.command.read_text()
    assert "export SET_UP=" in (record.path / "node.sh").read_text()
    assert not [path for path in record.path.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert main(["run", str(record.spec), "--site", str(record.site), "--output", str(record.path)]) == 2
    assert "environment.TOY_API_KEY is to be taken from your environment" in capfd.readouterr().err


def test_the_record_renders_the_job_again(
    toy_spec: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = toy_spec(steps=1)
    whole = {**WHOLE, "environment": {"HF_TOKEN": "hunter2", "ODD": "a 'b'\n$(c)"}}
    site = str(write(tmp_path, "whole.yaml", **whole))
    dry = ["--nodes", "2", "--dry-run"]
    assert main(["run", spec, "--site", site, *dry]) == 0
    rendered = capfd.readouterr().out
    assert "#SBATCH --partition=a100" in rendered
    assert "hunter2" not in rendered
    (tmp_path / "site.yaml").write_text(document.dump(sites.load(Path(site)).as_mapping()))
    assert "hunter2" not in (tmp_path / "site.yaml").read_text()
    assert main(["run", spec, "--site", "site.yaml", *dry]) == 0
    assert capfd.readouterr().out == rendered


@pytest.mark.parametrize(
    "block", re.findall(r"```yaml\n(.*?)```", (TOP / "docs" / "clusters.md").read_text(), re.S)
)
def test_a_site_in_the_pages_is_one(block: str, tmp_path: Path) -> None:
    (tmp_path / "page.yaml").write_text(block)
    assert sites.load(tmp_path / "page.yaml").backend in backends.BACKENDS


def test_a_shell_reads_200_hostile_words_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [text for text in hostile.strings() if "\0" not in text and "\ud800" not in text]
    monkeypatch.chdir(tmp_path)
    values = {
        "DIRECTORY": tmp_path,
        "RECORD": tmp_path,
        "SETUP": ["true", *words],
        "COMMAND": ["printf", r"%s\0", *words],
    }
    script = fill("node.sh", values, shell)
    ran = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert ran.stdout.decode().split("\0") == [*words, ""]
    assert not list(tmp_path.iterdir())
    assert shlex.split(shell(words)) == words
