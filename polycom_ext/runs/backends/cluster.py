"""The section `kubernetes:` of a site, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polycom_ext.errors import PolycomError, did_you_mean
from polycom_ext.runs import fields
from polycom_ext.runs.site import Site

KEYS = (
    *("kind", "namespace", "gpus", "resources", "volumes", "shared_memory"),
    *("secret", "user", "capabilities", "labels", "pod"),
)
LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
"""Kubernetes' own form of most names."""


@dataclass(frozen=True)
class Kind:
    """One kind of job: what it calls its parts, and how a pod learns its place."""

    plural: str
    """As `kubectl get` wants it."""
    container: str
    rank: str
    address: str
    port: str
    ports: tuple[Mapping[str, Any], ...] = ()
    restarts_itself: bool = True
    """Whether the cluster starts the nodes again, and not each node itself."""


KINDS = {
    "TrainJob": Kind(
        "trainjobs.trainer.kubeflow.org", "node", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"
    ),
    "PyTorchJob": Kind(
        *("pytorchjobs.kubeflow.org", "pytorch", "RANK", "MASTER_ADDR", "MASTER_PORT"),
        ports=({"name": "pytorchjob-port", "containerPort": 23456},),
        restarts_itself=False,
    ),
}


@dataclass(frozen=True)
class Cluster:
    """The section `kubernetes:` of a site, checked."""

    kind: str = "TrainJob"
    namespace: str | None = None
    """None: the one that kubectl is set to."""
    image: str = ""
    """`container.image`."""
    gpus: int = 0
    resources: Mapping[str, str] = field(default_factory=dict)
    """Further limits of a pod, as they are."""
    volumes: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = ()
    """A volume of the pod's, and where it is mounted."""
    shared_memory: str | None = None
    secret: str | None = None
    """The cluster's Secret that holds the secrets, each under its variable's name."""
    user: int | None = None
    group: int | None = None
    capabilities: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    pod: Mapping[str, Any] = field(default_factory=dict)
    """Merged into the pod's specification, as it is."""

    @classmethod
    def of(cls, site: Site) -> Cluster:
        """Raises PolycomError for an unknown key, a wrong value, and for no image."""
        given, origin = dict(site.kubernetes), "the site's `kubernetes`"
        fields.check_keys(given, KEYS, origin)
        kind = fields.text(given, "kind", origin, " or ".join(KINDS)) if "kind" in given else cls.kind
        if kind not in KINDS:
            raise PolycomError(
                f"{origin}: unknown kind {kind!r}{did_you_mean(kind, KINDS)}; known: {', '.join(KINDS)}"
            )
        if site.container is None:
            raise PolycomError(
                f"{origin}: the pods need an image that has polycom in it: `container: {{image: …}}`"
            )
        user, group = _user(given, origin)
        return cls(
            kind,
            namespace=_name(given, "namespace", origin),
            image=site.container.image,
            gpus=fields.count(given, "gpus", origin, 0, least=0),
            resources=_texts_by_name(given, "resources", origin),
            volumes=_volumes(given, origin),
            shared_memory=_optional(given, "shared_memory", origin),
            secret=_name(given, "secret", origin),
            user=user,
            group=group,
            capabilities=fields.texts(given, "capabilities", origin),
            labels=_texts_by_name(given, "labels", origin),
            pod=_pod(given, origin),
        )


def _volumes(given: dict[str, Any], origin: str) -> tuple[tuple[dict[str, Any], dict[str, Any]], ...]:
    """`CLAIM:/PATH[:ro]`, or {path: /PATH, read_only: …, KIND: …}, KIND being one of Kubernetes' own."""
    listed = given.get("volumes", [])
    if not isinstance(listed, list):
        raise PolycomError(f"{origin}: volumes must be a list, not {listed!r}")
    return tuple(_volume(one, f"volume-{n}", origin) for n, one in enumerate(listed))


def _volume(one: Any, name: str, origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if isinstance(one, str) and (parts := re.fullmatch(rf"({LABEL}):(/[^:]*)(:ro)?", one)):
        claim, _, path, read_only = parts.groups()
        source: dict[str, Any] = {"persistentVolumeClaim": {"claimName": claim}}
    elif isinstance(one, dict) and len(one.keys() - {"path", "read_only"}) == 1:
        path, read_only = one.get("path"), one.get("read_only", False)
        source = {key: value for key, value in one.items() if key not in ("path", "read_only")}
    else:
        path = read_only = None
    if not (isinstance(path, str) and path.startswith("/") and ":" not in path):
        raise PolycomError(
            f"{origin}: volumes: {one!r} is neither CLAIM:/PATH[:ro] nor a mapping of `path` and one kind of "
            "volume, as in {path: /data, nfs: {server: filer, path: /export}}"
        )
    mount = {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}
    return {"name": name, **source}, mount


def _pod(given: dict[str, Any], origin: str) -> dict[str, Any]:
    pod = fields.section(given, "pod", origin)
    for key in ("containers", "volumes", "restartPolicy"):
        if key in pod:
            raise PolycomError(
                f"{origin}: pod.{key} is polycom's to fill in; the other keys have their places"
            )
    return pod


def _texts_by_name(given: dict[str, Any], key: str, origin: str) -> dict[str, str]:
    section = fields.section(given, key, origin)
    return {name: fields.text(section, name, f"{origin}: {key}", "as Kubernetes has it") for name in section}


def _name(given: dict[str, Any], key: str, origin: str) -> str | None:
    name = _optional(given, key, origin)
    if name is not None and not re.fullmatch(LABEL, name):
        raise PolycomError(f"{origin}: {key} {name!r} must be small letters, digits and '-'")
    return name


def _optional(given: dict[str, Any], key: str, origin: str) -> str | None:
    return fields.text(given, key, origin, "a text") if key in given else None


def _user(given: dict[str, Any], origin: str) -> tuple[int | None, int | None]:
    """`user: UID` or `user: UID:GID`."""
    text = _optional(given, "user", origin)
    if text is None:
        return None, None
    if not (parts := re.fullmatch(r"([1-9]\d{0,9})(?::(\d{1,10}))?", text)):
        raise PolycomError(f"{origin}: user {text!r} must be UID or UID:GID, and not root's")
    return int(parts[1]), None if parts[2] is None else int(parts[2])
