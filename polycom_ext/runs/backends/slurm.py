"""The backend `slurm`: a run as a batch job, which Slurm queues again until it is done."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from polycom_ext.errors import PolycomError
from polycom_ext.runs import node, secrets
from polycom_ext.runs.backends import Standing, container
from polycom_ext.runs.backends.rendering import (
    JOB_SCRIPT,
    NODE_SCRIPT,
    Verbatim,
    fill,
    node_command,
    node_script,
    shell,
)
from polycom_ext.runs.plan import Run
from polycom_ext.runs.rendering import BREAK
from polycom_ext.runs.site import Container

WARNING = "USR1"
"""The signal that says that the time limit is near, the spec's `stop_grace_seconds` before it."""
ASK_SECONDS = 10.0
"""How long whoever only looks waits for Slurm."""
AT_WORK = ("RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
OF_THE_SPEC = {
    "nodes": "nodes",
    "ntasks": "processes_per_node",
    "ntasks-per-node": "processes_per_node",
}
"""sbatch's option -> the spec's key that decides it."""


class Slurm:
    """Submits a job, and returns."""

    def files(self, run: Run) -> dict[str, str]:
        image = run.site.container
        command, step_options = node_command(run), list[str]()
        trial = None
        if image is not None and image.engine == "pyxis":
            step_options = _pyxis(run, image)
        elif image is not None:
            trial = container.wrap(image, run, ["true"])  # nobody is left to tell what the engine refuses
            command = container.wrap(image, run, command)
        job = {
            "OPTIONS": Verbatim("\n".join(_options(run))),
            "NODES": run.spec.nodes,
            "STEP_OPTIONS": Verbatim("".join(f"{BREAK}{shell(option)}" for option in step_options)),
            "RECORD": run.directory.path,
            "NODE_SCRIPT": run.directory.path / NODE_SCRIPT,
            "MAX_RESTARTS": run.site.max_restarts,
        }
        return {
            JOB_SCRIPT: fill("slurm.sh", job, shell),
            NODE_SCRIPT: node_script(run, command, trial),
        }

    def check(self, run: Run) -> None:
        """A run has one job at a time, whichever machine it waits on."""
        number = _job(run)
        state = None if number is None else _state(number)
        if state is not None:
            raise PolycomError(
                f"{run.directory.path} is in use by job {number}, which is {state.lower()}: wait for it, "
                f"end it with `polycom stop {run.directory.path}`, or give another --output"
            )

    def submit(self, run: Run, log: BinaryIO) -> _Queued:
        environment = {**os.environ, **secrets.values(run.command.environment)}
        job = _slurm("sbatch", "--parsable", str(run.directory.path / JOB_SCRIPT), environment=environment)
        number = job.strip().partition(";")[0]  # a federation adds the cluster
        run.directory.write_job({"backend": "slurm", "host": platform.node(), "job": number})
        path = shlex.quote(str(run.directory.path))
        watch = f"`polycom status {path} --watch` and `polycom logs {path} -f`"
        print(f"{run.name}: job {number}; {watch} show it, `polycom stop {path}` ends it", flush=True)
        return _Queued()

    def standing(self, job: Mapping[str, Any]) -> Standing | None:
        asked = ["squeue", "--noheader", "--format=%T %r", f"--jobs={job['job']}"]
        try:
            state, _, reason = _slurm(*asked, seconds=ASK_SECONDS).strip().partition(" ")
        except PolycomError:  # nor does it know a job that ended a while ago
            return None
        why = "" if reason in ("", "None") else f" ({reason})"
        said = f"job {job['job']} is {state.lower()}{why}"
        return Standing(said, state in AT_WORK) if state else None

    def stop(self, run: Run) -> None:
        """A waiting job is cancelled; a running one is told to end, with as much time as that takes."""
        number = _job(run)
        state = None if number is None else _state(number)
        if number is None or state is None:
            raise PolycomError(f"{run.name}: Slurm has no job of it, waiting or running: nothing to stop")
        if state == "RUNNING":
            _slurm("scancel", "--signal=TERM", number)
            print(f"{run.name}: told job {number} to end; `scancel {number}` does not wait for a checkpoint")
        else:
            _slurm("scancel", number)
            print(f"{run.name}: cancelled job {number}, which was {state.lower()}")


class _Queued:
    """Slurm has it."""

    def status(self) -> int:
        return node.DONE

    def signal(self, signum: int) -> None: ...


def _options(run: Run) -> list[str]:
    """The job's lines for sbatch: ours, and those of the site, which win."""
    for name, value in run.site.slurm.items():
        _check_option(run, name, value)
    ours: dict[str, Any] = {
        "job-name": run.name,
        "nodes": run.spec.nodes,
        "ntasks-per-node": 1,
        "output": _without_patterns(run.directory.job_log),
        "open-mode": "append",
        "requeue": True,
        "signal": f"{WARNING}@{run.spec.stop_grace_seconds}",
    }
    lines = []
    for name, value in {**ours, **run.site.slurm}.items():
        if value is not False:
            lines.append(f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={quoted(str(value))}")
    return lines


def _check_option(run: Run, name: str, value: Any) -> None:
    if name in OF_THE_SPEC:
        raise PolycomError(f"{run.name}: the site's slurm.{name} is the spec's to say: `{OF_THE_SPEC[name]}`")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise PolycomError(f"{run.name}: the site's slurm.{name} is no long option of sbatch")
    if not isinstance(value, str | int | float):
        raise PolycomError(
            f"{run.name}: the site's slurm.{name} must be a text, a number or true, not {value!r}"
        )
    if "\n" in str(value):
        raise PolycomError(f"{run.name}: the site's slurm.{name} has several lines, which sbatch cannot read")


def quoted(value: str) -> str:
    """As sbatch reads it in a script: in double quotes, where a backslash takes the meaning from the next."""
    if re.fullmatch(r"[\w@%+=:,./-]+", value, re.ASCII):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _without_patterns(path: Path) -> str:
    """A file's name in which Slurm replaces nothing."""
    if "\n" in str(path):
        raise PolycomError(f"{path}: a name of several lines cannot be told to Slurm; give another --output")
    return str(path).replace("%", "%%")


def _pyxis(run: Run, image: Container) -> list[str]:
    """Options that pyxis adds to srun's: each task is in the container then, node.sh with it."""
    if run.site.setup:
        raise PolycomError(
            f"{run.name}: the site's setup is for outside a container, where pyxis runs nothing: "
            "leave it to the image, or to `environment:`"
        )
    here = [str(run.directory.path), str(run.command.directory)]
    mounts = [*(f"{path}:{path}" for path in dict.fromkeys(here)), *map(_twice, image.mounts)]
    for mount in mounts:
        if "," in mount:
            raise PolycomError(f"{run.name}: pyxis cannot mount {mount!r}: no comma may be in it")
    return [
        f"--container-image={image.image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={run.command.directory}",
        *image.options,
    ]


def _twice(mount: str) -> str:
    return mount if ":" in mount else f"{mount}:{mount}"


def _job(run: Run) -> str | None:
    """The job that has the run, or had it."""
    job = run.directory.read_job() or {}
    return str(job["job"]) if job.get("backend") == "slurm" else None


def _state(number: str) -> str | None:
    """How a job stands, in Slurm's word; None once it has ended."""
    told = _slurm("squeue", "--noheader", "--format=%i %T", "--me", "--states=all")
    states = dict(line.split(maxsplit=1) for line in told.splitlines())
    state = states.get(number, "").strip()
    return (
        state
        if state in ("PENDING", "RUNNING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING")
        else None
    )


def _slurm(*command: str, environment: dict[str, str] | None = None, seconds: float | None = None) -> str:
    """What one of Slurm's commands prints; raises PolycomError with its own words where it fails."""
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise PolycomError(f"{command[0]} has not answered for {seconds} s") from None
    except FileNotFoundError:
        raise PolycomError(
            f"{command[0]} is not here: give this where jobs of Slurm are submitted, on a login node"
        ) from None
    if ended.returncode:
        raise PolycomError(" ".join(ended.stderr.split()) or f"{command[0]} failed: {ended.returncode}")
    return ended.stdout
