"""A site: what a cluster always needs of a run, in one YAML file, so that no spec names a machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polycom_ext import shipped
from polycom_ext.errors import PolycomError, did_you_mean
from polycom_ext.runs import fields, secrets
from polycom_ext.runs.wishes import Wishes

ENGINES = ("docker", "podman", "pyxis", "apptainer")
"""`container.engine`: pyxis is Slurm's plugin, the others are commands."""
SHIPPED = "sites"
"""The folder in `launch/` with the sites that travel with the package."""


@dataclass(frozen=True)
class Container:
    """What each node runs in."""

    image: str
    """In the engine's own words: a name with a digest, or a file."""
    engine: str = ""
    """One of ENGINES; nothing where a backend leaves no choice."""
    mounts: tuple[str, ...] = ()
    """HOST[:INSIDE[:OPTIONS]]; the run's directory and the working directory are mounted in any case."""
    options: tuple[str, ...] = ()
    """The engine's own, as they are."""
    off: tuple[str, ...] = ()
    """Which of the options it does without that an engine is given by default."""


@dataclass(frozen=True)
class Site:
    """A resolved site file; that of a plain machine where there is none."""

    backend: str = "local"
    """Who starts the nodes: a name of `runs.backends`."""
    container: Container | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of every node, beneath the spec's own."""
    setup: tuple[str, ...] = ()
    """Shell lines that each node runs before, outside the container."""
    hosts: tuple[str, ...] = ()
    """[USER@]HOST of each node, the first one first, where nobody allots them."""
    ssh_options: tuple[str, ...] = ()
    """The ssh client's own, as they are."""
    slurm: Mapping[str, Any] = field(default_factory=dict)
    """sbatch's long options, as they are."""
    kubernetes: Mapping[str, Any] = field(default_factory=dict)
    max_restarts: int = 3
    """How often a run is started again that failed, or was stopped by a time limit."""
    preflight: Mapping[str, Any] = field(default_factory=dict)
    """What must hold of the nodes before a run begins."""

    def as_mapping(self) -> dict[str, Any]:
        """The mapping of a file that is read back as this site, but for the values of its secrets."""
        mapping: dict[str, Any] = {"backend": self.backend}
        if self.container is not None:
            about = vars(self.container)
            mapping["container"] = {key: _plain(value) for key, value in about.items() if value}
        mapping |= {key: _plain(value) for key, value in vars(self).items() if value and key not in mapping}
        if self.environment:
            mapping["environment"] = secrets.masked(self.environment)
        return {**mapping, "max_restarts": self.max_restarts}


def load(path: Path) -> Site:
    """Read a site file with everything it extends: beside it, or one of the shipped ones.

    Raises PolycomError for a missing or malformed file, a cycle, an unknown key or a value of the wrong type.
    """
    return _from_mapping(fields.read(path, "site file", found=_beside_or_shipped), str(path))


def find(name: str) -> Path:
    """The file that `--site NAME` asks for: a path, or the name of one in `launch/sites/`."""
    path = Path(name)
    if path.exists() or path.name != name or path.suffix:
        return shipped.find(path)
    sites = shipped.folder("launch") / SHIPPED
    ours = sites / f"{name}.yaml"
    if not ours.is_file():
        known = sorted(path.stem for path in sites.glob("*.yaml"))
        raise PolycomError(
            f"unknown site {name!r}{did_you_mean(name, known)}; give a file, or one of {', '.join(known)}"
        )
    return ours


def _beside_or_shipped(path: Path) -> Path:
    ours = shipped.folder("launch") / SHIPPED / path.name
    return path if path.exists() or not ours.is_file() else ours


def _from_mapping(mapping: dict[str, Any], origin: str) -> Site:
    fields.check_keys(mapping, tuple(Site.__dataclass_fields__), origin)
    for key in (key for key in mapping if key != "environment"):
        _refuse_secrets(mapping[key], key, origin)
    backend = {"backend": Site.backend, **mapping}
    Wishes.from_mapping(fields.section(mapping, "preflight", origin), origin)
    return Site(
        backend=fields.text(backend, "backend", origin, "who starts the nodes"),
        container=_container(mapping, origin) if "container" in mapping else None,
        environment=fields.environment(mapping, origin),
        setup=fields.texts(mapping, "setup", origin),
        hosts=_hosts(mapping, origin),
        ssh_options=fields.texts(mapping, "ssh_options", origin),
        slurm=fields.section(mapping, "slurm", origin),
        kubernetes=fields.section(mapping, "kubernetes", origin),
        max_restarts=fields.count(mapping, "max_restarts", origin, Site.max_restarts, least=0),
        preflight=fields.section(mapping, "preflight", origin),
    )


def _container(mapping: dict[str, Any], origin: str) -> Container:
    about = fields.section(mapping, "container", origin)
    where = f"{origin}: container"
    fields.check_keys(about, tuple(Container.__dataclass_fields__), where)
    engine = str(about.get("engine", ""))
    if engine and engine not in ENGINES:
        raise PolycomError(
            f"{where}: unknown engine {engine!r}{did_you_mean(engine, ENGINES)}; known: {', '.join(ENGINES)}"
        )
    image = fields.text(about, "image", where, "the image's name in the engine's words")
    if image.startswith("-"):
        raise PolycomError(f"{where}: an engine would take the image {image!r} for an option")
    return Container(
        image,
        engine,
        fields.texts(about, "mounts", where),
        fields.texts(about, "options", where),
        fields.texts(about, "off", where),
    )


def _hosts(mapping: dict[str, Any], origin: str) -> tuple[str, ...]:
    hosts = fields.texts(mapping, "hosts", origin)
    for host in hosts:
        if host.startswith("-") or re.search(r"\s", host):
            raise PolycomError(f"{origin}: hosts: {host!r} is no [USER@]HOST")
    return hosts


def _refuse_secrets(value: Any, key: str, origin: str) -> None:
    """Of `environment` a record keeps no secret; whatever else holds one would be written into files."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else ((None, one) for one in value)
        for name, one in inner:
            _refuse_secrets(one, key if name is None else f"{key}.{name}", origin)
    elif isinstance(value, str) and (name := secrets.in_text(value)) is not None:
        raise PolycomError(
            f"{origin}: {key} holds {name}, which looks like a secret and would be written into the run's "
            f"record: name it in `environment:`, or take it from a file, as in `export NAME=$(cat FILE)`"
        )


def _plain(value: Any) -> Any:
    """What YAML writes without a tag."""
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
