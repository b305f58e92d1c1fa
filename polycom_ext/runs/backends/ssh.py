"""The backend `ssh`: a node on each of a site's hosts, which goes on whatever becomes of this process."""

from __future__ import annotations

import os
import shlex
import uuid
from collections.abc import Mapping
from typing import Any, BinaryIO

from polycom_ext.errors import PolycomError
from polycom_ext.runs import secrets
from polycom_ext.runs.backends import Submitted, remote
from polycom_ext.runs.backends.remote import Host
from polycom_ext.runs.backends.rendering import (
    JOB_SCRIPT,
    NODE_SCRIPT,
    fill,
    node_command,
    node_script,
    shell,
)
from polycom_ext.runs.plan import Run

MARK = "POLYCOM_JOB"
"""Variable by which a host tells the processes of this job from others that got their ids later."""


class Ssh:
    """Has every host execute job.sh, which starts its node, and again after what a restart can mend."""

    name = "ssh"

    def files(self, run: Run) -> dict[str, str]:
        self.hosts(run)
        if run.site.container is not None:
            raise PolycomError(
                f"{run.name}: the backend ssh starts nodes without a container, and the site names one: "
                "`--backend docker` starts it on the same hosts"
            )
        return host_scripts(run, node_command(run))

    def submit(self, run: Run, log: BinaryIO) -> Submitted:
        hosts = self.hosts(run)
        rendezvous = f"{hosts[0].address()}:{remote.free_port(hosts[0])}"
        job = uuid.uuid4().hex
        run.directory.write_job({"backend": self.name, "job": job, "hosts": [host.name for host in hosts]})
        print(
            f"{run.name}: node 0 is to hear the others at {rendezvous}; the nodes outlive this process, and "
            f"`polycom stop {run.directory.path}` ends them",
            flush=True,
        )
        scripts = [(host, _start(run, job, rank, rendezvous)) for rank, host in enumerate(hosts)]
        return remote.Nodes(run.name, scripts, lambda rank, name: self.tell(run, job, rank, name))

    def standing(self, job: Mapping[str, Any]) -> None:
        """Nobody queues it."""

    def stop(self, run: Run) -> None:
        job = run.directory.read_job()
        if job is None:
            raise PolycomError(f"{run.name} was handed over to no hosts: nothing to stop")
        unheard = []
        for rank, name in enumerate(job["hosts"]):
            host = Host(name, run.site.ssh_options)
            try:
                told = host.ask(self.tell(run, job["job"], rank, "TERM"))
            except PolycomError as error:
                unheard.append(f"{error} (node {rank})")
                continue
            how = "is told to end" if told else "does not run"
            print(f"{run.name}: node {rank} ({host}) {how}", flush=True)
        if unheard:
            raise PolycomError(f"{run.name}: {'; '.join(unheard)}; the others are told: give it again later")

    def hosts(self, run: Run) -> list[Host]:
        """Where each node runs. Raises PolycomError where the site has too few."""
        site, nodes = run.site, run.spec.nodes
        if len(site.hosts) < nodes:
            listed = ", ".join(site.hosts) or "none"
            raise PolycomError(
                f"{run.name}: nodes is {nodes}, and the site's `hosts` are fewer ({listed}); add some, or "
                "give fewer --nodes"
            )
        return [Host(name, site.ssh_options) for name in site.hosts[:nodes]]

    def check(self, run: Run) -> None:
        """Refuse a host where the node could not start."""
        python = shell(node_command(run)[0])
        setup = "\n".join([f"cd {shell(run.command.directory)} || exit", *run.site.setup])
        remote.ask_all(
            self.hosts(run),
            looks(run)
            + or_refuse(f"command -v {python} >/dev/null", f"it has no {python}")
            + or_refuse(
                shell(["bash", "-c", f"{setup}\n{python} -c 'import polycom_ext' 2>/dev/null"]),
                f"its {python} has no polycom_ext, after the site's `setup`",
            ),
        )

    def tell(self, run: Run, job: str, rank: int, signal: str) -> str:
        """A script that passes a signal on to the node of a job, if it runs there, and then says so."""
        pid_file = shell(run.directory.path / f"node-{rank}.pid")
        return (
            f"pid=$(cat {pid_file} 2>/dev/null) || exit 0\n"
            f"tr '\\0' '\\n' 2>/dev/null </proc/\"$pid\"/environ | grep -qxF {MARK}={shell(job)} || exit 0\n"
            f'kill -s {signal} "$pid" && echo told\n'
        )


def host_scripts(run: Run, command: list[str]) -> dict[str, str]:
    """What a host executes, job.sh, and the node.sh within that, which executes the command."""
    values = {
        "DIRECTORY": run.directory.path,
        "NODE_SCRIPT": run.directory.path / NODE_SCRIPT,
        "MAX_RESTARTS": run.site.max_restarts,
    }
    return {JOB_SCRIPT: fill("host.sh", values, shell), NODE_SCRIPT: node_script(run, command)}


def _start(run: Run, job: str, rank: int, rendezvous: str) -> str:
    """Starts job.sh in a session of its own, which no end of this one reaches.

    Only here do the values of secrets stand, on no disk and on no command line.
    """
    hidden = [name for name, value in run.command.environment.items() if secrets.is_secret(name, value)]
    values = {name: run.command.environment[name] for name in hidden}
    values |= {name: os.environ[name] for name, value in values.items() if value == secrets.reference(name)}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in {**values, MARK: job}.items()]
    start = f"setsid bash {shell([run.directory.path / JOB_SCRIPT, rank, rendezvous])} </dev/null"
    return "\n".join([*exports, start, "exit $?"]) + "\n"


def looks(run: Run) -> str:
    """A script that fails with a sentence on a host that can start no node of the run."""
    path = run.directory.path
    return or_refuse(
        f"[ -d {shell(path)} ]", f"{path} is not there: all nodes share the file system of a run"
    ) + or_refuse("command -v bash setsid >/dev/null", "it has no bash or no setsid")


def or_refuse(condition: str, sentence: str) -> str:
    return f"{condition} || {{ echo {shlex.quote(sentence)} >&2; exit 1; }}\n"
