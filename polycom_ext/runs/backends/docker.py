"""The backend `docker`: a node in a container on each of a site's hosts, or here."""

from __future__ import annotations

from polycom_ext.errors import PolycomError
from polycom_ext.runs.backends import container, remote
from polycom_ext.runs.backends.remote import Host
from polycom_ext.runs.backends.rendering import node_command, shell
from polycom_ext.runs.backends.ssh import Ssh, host_scripts, looks, or_refuse
from polycom_ext.runs.plan import Run
from polycom_ext.runs.site import Container

ENGINES = ("docker", "podman")
HERE = "localhost"
"""In `hosts`, this machine, as often as it stands there."""
PULL_SECONDS = 3600.0
"""How long an image of 20 GB may take."""


class Docker(Ssh):
    """As the backend `ssh`, in containers; without `hosts` this machine is the one node."""

    name = "docker"

    def files(self, run: Run) -> dict[str, str]:
        command = container.wrap(_container(run), run, node_command(run))
        self.hosts(run)
        return host_scripts(run, command)

    def check(self, run: Run) -> None:
        """Refuse a host without the engine; one without the image gets it."""
        about, hosts = _container(run), list(dict.fromkeys(self.hosts(run)))
        engine, image = container.chosen(about), shell(about.image)
        remote.ask_all(
            hosts,
            looks(run)
            + or_refuse(f"command -v {engine} >/dev/null", f"it has no {engine}")
            + or_refuse(
                f"{engine} version >/dev/null 2>&1", f"its {engine} does not answer: `{engine} version`"
            ),
        )
        for host in hosts:
            if not host.ask(f"{engine} image inspect {image} >/dev/null 2>&1 || echo missing"):
                continue
            print(f"{run.name}: {engine} pulls {about.image} on {host}", flush=True)
            try:
                host.ask(f"{engine} pull {image} >/dev/null", PULL_SECONDS)
            except PolycomError as error:
                raise PolycomError(
                    f"{run.name}: the image {about.image} is not there and cannot be pulled: {error}; "
                    "build it, or name another in the site's `container:`"
                ) from error

    def hosts(self, run: Run) -> list[Host]:
        """As of ssh, but that `localhost` is this machine, and stands for no list."""
        if not run.site.hosts and run.spec.nodes == 1:
            return [Host()]
        hosts = [Host() if host.name == HERE else host for host in super().hosts(run)]
        if hosts[0].name is None and any(host.name for host in hosts):
            raise PolycomError(
                f"{run.name}: others of the site's `hosts` are to reach the first one, "
                f"and have no name for it but {HERE}"
            )
        return hosts

    def tell(self, run: Run, job: str, rank: int, signal: str) -> str:
        """Also to a container that has outlived the script that started it."""
        kill = [container.chosen(_container(run)), "kill", "--signal", signal, container.named(run, rank)]
        return (
            f"told=$({super().tell(run, job, rank, signal)})\n"
            f'[ -n "$told" ] || {shell(kill)} >/dev/null 2>&1 || exit 0\n'
            "echo told\n"
        )


def _container(run: Run) -> Container:
    about = run.site.container
    if about is None or container.chosen(about) not in ENGINES:
        raise PolycomError(
            f"{run.name}: the backend docker wants a site whose `container:` has an image, and "
            f"{' or '.join(ENGINES)} as engine"
        )
    return about
