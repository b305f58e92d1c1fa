"""The job script of the backend `slurm`, beside commands that only note what they are told."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polycom_ext.errors import PolycomError
from polycom_ext.runs import plan
from polycom_ext.runs.backends.slurm import Slurm
from polycom_ext.runs.site import Container, Site
from polycom_ext.runs.spec import load

from . import hostile

COMMANDS = {
    "srun": r"""printf '%s\0' "$@" >srun; printf %s "$POLYCOM_RENDEZVOUS" >rendezvous; exit "$STATUS" """,
    "scontrol": """[ $1 = show ] && echo "NodeName=n7 NodeAddr=10.0.0.7 Port=1" || echo "$@" >scontrol""",
    "squeue": 'echo "$STATE"',
}


@pytest.fixture
def files(toy_spec: Callable[..., str]) -> Callable[..., dict[str, str]]:
    """What is rendered for a site with these keys."""

    def render(
        path: str = "outputs/small", stop_grace_seconds: int | None = None, **site: Any
    ) -> dict[str, str]:
        spec, keys = Path(toy_spec()), ["nodes=2"]
        if stop_grace_seconds is not None:
            keys.append(f"stop_grace_seconds={stop_grace_seconds}")
        return Slurm().files(
            plan.planned(load(spec, keys), Path(path).absolute(), Path("outputs"), Site(**site))
        )

    return render


def run(script: str, status: int = 0, state: str = "RUNNING", **variables: str) -> int:
    """The exit status of a job on its first node."""
    Path("bin").mkdir(exist_ok=True)
    for name, text in COMMANDS.items():
        (Path("bin") / name).write_text(f"#!/bin/sh\n{text}\n")
        (Path("bin") / name).chmod(0o755)
    slurms = {"SLURM_JOB_ID": "12001", "SLURMD_NODENAME": "n7", "STATUS": str(status), "STATE": state}
    environment = {"PATH": f"{Path('bin').absolute()}:{os.environ['PATH']}", **slurms, **variables}
    return subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, check=False
    ).returncode


def step_options() -> list[str]:
    """What srun was told."""
    return Path("srun").read_text().split("\0")[:-1]


def listening(address: str, port: int) -> socket.socket:
    """A socket on which somebody waits."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family)


def free_ports(count: int) -> int:
    """The first of so many in a row, among those that a job may take."""
    for first in range(20000 + os.getpid() % 10000, 32000 - count):
        try:
            for port in range(first, first + count):
                listening("0.0.0.0", port).close()
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@pytest.mark.parametrize("status", [1, 134, 137, 138])
def test_what_a_restart_can_mend_is_queued_again_up_to_max_restarts(
    files: Callable[..., dict[str, str]], status: int
) -> None:
    job = files(max_restarts=2)["job.sh"]
    assert run(job, status, SLURM_RESTART_COUNT="2") == status
    assert not Path("scontrol").exists()
    assert run(job, status, SLURM_RESTART_COUNT="1") == status
    assert Path("scontrol").read_text() == "requeue 12001\n"


@pytest.mark.parametrize("status", [0, 2, 125, 126, 127, 129, 130, 143])
def test_what_is_done_refused_or_stopped_by_a_person_is_not(
    files: Callable[..., dict[str, str]], status: int
) -> None:
    assert run(files()["job.sh"], status) == status
    assert not Path("scontrol").exists()


def test_a_job_that_is_being_ended_is_not_queued_again(files: Callable[..., dict[str, str]]) -> None:
    assert run(files()["job.sh"], 1, state="COMPLETING") == 1
    assert not Path("scontrol").exists()


def test_the_nodes_meet_at_the_first_ones_address_and_a_port_that_nothing_listens_on(
    files: Callable[..., dict[str, str]],
) -> None:
    job, first = files()["job.sh"], free_ports(3)
    number = str(first - 20000 + 12000)
    with listening("0.0.0.0", first), listening("::1", first + 1):
        assert run(job, SLURM_JOB_ID=number) == 0
    assert Path("rendezvous").read_text() == f"10.0.0.7:{first + 2}"
    assert run(job, SLURM_JOB_ID=number) == 0
    assert Path("rendezvous").read_text() == f"10.0.0.7:{first}"


def test_a_step_has_one_task_a_node_and_all_cpus_of_it(files: Callable[..., dict[str, str]]) -> None:
    assert run(files()["job.sh"]) == 0
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpu-bind=none"} <= set(step_options())
    assert step_options()[-2:] == ["bash", str(Path("outputs/small/node.sh").absolute())]


def test_the_time_limit_is_announced_as_early_as_a_checkpoint_takes(
    files: Callable[..., dict[str, str]],
) -> None:
    assert "\n#SBATCH --signal=USR1@600\n" in files()["job.sh"]
    assert "\n#SBATCH --signal=USR1@45\n" in files(stop_grace_seconds=45)["job.sh"]
    assert "\n#SBATCH --signal=TERM@5\n" in files(slurm={"signal": "TERM@5"})["job.sh"]


def test_pyxis_gets_image_and_mounts_as_they_are(files: Callable[..., dict[str, str]]) -> None:
    image = "".join(text for text in hostile.SAMPLE)
    mounts = ("/data", "/a b'$(touch canary):/c:ro")
    rendered = files(container=Container(image, "pyxis", mounts, ("--no-container-remap-root",)))
    assert run(rendered["job.sh"]) == 0
    here = Path.cwd()
    told = f"{here}/outputs/small:{here}/outputs/small,{here}:{here},/data:/data,/a b'$(touch canary):/c:ro"
    assert f"--container-image={image}" in step_options()
    assert f"--container-mounts={told}" in step_options()
    assert "--no-container-remap-root" in step_options()
    assert f"exec polycom node {here}/outputs/small\n" in rendered["node.sh"]
    assert not Path("canary").exists()


def test_an_engines_command_is_what_each_node_executes(files: Callable[..., dict[str, str]]) -> None:
    rendered = files(container=Container("i.sif", "apptainer"), setup=("module load apptainer",))
    lines = rendered["node.sh"].splitlines()
    trial = lines[lines.index("module load apptainer") + 1]
    assert trial.startswith("apptainer exec ")
    assert trial.endswith(" i.sif true"), "what the engine refuses ends node.sh, which tells the others"
    [started] = (line for line in lines if line.startswith("exec "))
    assert started.startswith("exec apptainer exec ")
    assert started.endswith(f" i.sif polycom node {Path('outputs/small').absolute()}")


@pytest.mark.parametrize(
    ("path", "site", "sentence"),
    [
        ("a\nb", {}, "a name of several lines cannot be told to Slurm; give another --output"),
        ("a", {"slurm": {"nodes": 4}}, "the site's slurm.nodes is the spec's to say: `nodes`"),
        ("a", {"slurm": {"Time": 4}}, "the site's slurm.Time is no long option of sbatch"),
        ("a", {"slurm": {"time": [1]}}, "slurm.time must be a text, a number or true, not [1]"),
        ("a", {"slurm": {"comment": "a\n#SBATCH --wrap=b"}}, "slurm.comment has several lines"),
        (
            "a",
            {"container": Container("i", "pyxis"), "setup": ("x",)},
            "outside a container, where pyxis runs",
        ),
        ("a", {"container": Container("i", "pyxis", ("/a,b",))}, "pyxis cannot mount '/a,b:/a,b': no comma"),
    ],
)
def test_what_slurm_could_not_be_told_is_refused_in_a_sentence(
    files: Callable[..., dict[str, str]], path: str, site: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PolycomError) as caught:
        files(path, **site)
    assert sentence in str(caught.value)


def test_a_container_is_asked_for_its_files_where_it_runs(toy_spec: Callable[..., str]) -> None:
    spec = Path(toy_spec(needs="/data/of/the/image", steps=1))
    bare, inside = (
        plan.planned(load(spec), None, Path("outputs"), Site(container=image))
        for image in (None, Container("image", "docker"))
    )
    plan.check_inputs(inside)
    with pytest.raises(PolycomError, match="/data/of/the/image not found"):
        plan.check_inputs(bare)
