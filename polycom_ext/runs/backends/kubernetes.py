"""The backend `kubernetes`: a TrainJob of Kubeflow's Trainer v2, or a PyTorchJob of its Training Operator v1.

The manifests are those of `launch/kubernetes/`, filled in. A pod is a node: it runs `polycom node RUN_DIR` in
an image that has polycom, with the run's directory on a volume that all of them share.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any, BinaryIO

from polycom_ext.errors import PolycomError
from polycom_ext.runs import fields, secrets
from polycom_ext.runs.backends import Standing, Submitted, manifest
from polycom_ext.runs.backends.cluster import KINDS, Cluster, Kind
from polycom_ext.runs.backends.rendering import JOB_SCRIPT, shell
from polycom_ext.runs.backends.ssh import host_scripts
from polycom_ext.runs.plan import Run

MANIFEST = "job.yaml"
COMMAND = ["polycom", "node"]
GPU = "nvidia.com/gpu"
MARGIN_SECONDS = 30
"""What a node has to end in, beyond the time that its trainer has to save."""
ASK_SECONDS = 10.0
"""How long whoever only looks waits for the cluster."""
NAME_LENGTH = 26
"""Of a run's name in the job's, which Kubernetes lengthens to at most 63 for its pods."""


class Kubernetes:
    """Renders the manifest, and hands it over where there is a kubectl."""

    def files(self, run: Run) -> dict[str, str]:
        cluster = Cluster.of(run.site)
        _check_shared(run, cluster)
        if run.site.setup:
            raise PolycomError(
                f"{run.name}: the site's `setup` lines run outside a container, and a pod is one: have the "
                "image do it"
            )
        rendered = {MANIFEST: _manifest(run, cluster)}
        if not KINDS[cluster.kind].restarts_itself:
            rendered |= host_scripts(run, [*COMMAND, str(run.directory.path)])
        return rendered

    def check(self, run: Run) -> None:
        if shutil.which("kubectl") is not None and _state(run) == "active":
            raise PolycomError(
                f"{run.name}: its {Cluster.of(run.site).kind} {job_name(run)} is in the cluster already; "
                f"`polycom stop {run.directory.path}` ends it"
            )

    def submit(self, run: Run, log: BinaryIO) -> Submitted:
        cluster = Cluster.of(run.site)
        where = {"kind": cluster.kind, "name": job_name(run), "namespace": cluster.namespace}
        run.directory.write_job({"backend": "kubernetes", **where})
        path = run.directory.path / MANIFEST
        if shutil.which("kubectl") is None:
            print(f"{run.name}: no kubectl is here; give where one is:\n    kubectl create -f {shell(path)}")
            return _HandedOver()
        if _state(run) == "ended":
            _kubectl("delete", "--ignore-not-found", "--wait", f"--filename={path}")
        _kubectl("create", f"--filename={path}")
        print(
            f"{run.name}: handed over as {job_name(run)}; `polycom status {run.directory.path}` and "
            f"`polycom logs {run.directory.path}` follow it, `polycom stop {run.directory.path}` ends it",
            flush=True,
        )
        return _HandedOver()

    def standing(self, job: Mapping[str, Any]) -> Standing | None:
        """Whether its pods run is not asked: they write."""
        try:
            state = _ask(job["kind"], job["name"], job["namespace"], ASK_SECONDS)
        except PolycomError:
            return None
        said = f"{job['kind']} {job['name']} has not ended"
        return Standing(said, is_at_work=True) if state == "active" else None

    def stop(self, run: Run) -> None:
        """Its pods are told to end; the manifest is handed over anew by the next `polycom run`."""
        if _state(run) == "absent":
            raise PolycomError(f"{run.name}: the cluster has no job of it: nothing to stop")
        _kubectl(
            "delete", "--ignore-not-found", "--wait=false", f"--filename={run.directory.path / MANIFEST}"
        )
        print(f"{run.name}: its pods are told to end", flush=True)


class _HandedOver:
    """The cluster has it."""

    def status(self) -> int:
        return 0

    def signal(self, signum: int) -> None: ...


def job_name(run: Run) -> str:
    """The run's name as Kubernetes allows one, and what tells it from a run of that name elsewhere."""
    plain = re.sub(r"[^a-z0-9]+", "-", run.name.lower())
    if not plain[0].isalpha():
        plain = f"run-{plain}"
    mark = hashlib.sha256(str(run.directory.path).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{plain[:NAME_LENGTH].strip('-')}-{mark}"


def _manifest(run: Run, cluster: Cluster) -> str:
    name = job_name(run)
    values = {
        "name": name,
        "metadata": _present(
            name=name,
            namespace=cluster.namespace,
            labels=dict(cluster.labels) or None,
            annotations={"polycom/run": str(run.directory.path)},
        ),
        "nodes": run.spec.nodes,
        "processes": run.spec.processes_per_node,
        "max_restarts": run.site.max_restarts,
        "pod": _pod_of_a_node(run, cluster),
    }
    if cluster.kind == "TrainJob":
        return manifest.render(["kubernetes/runtime.yaml", "kubernetes/trainjob.yaml"], values)
    others = run.spec.nodes - 1
    workers = {"replicas": others, "restartPolicy": "Never", "template": {"spec": values["pod"]}}
    return manifest.render(["kubernetes/pytorchjob.yaml"], {**values, "workers": workers if others else None})


def _pod_of_a_node(run: Run, cluster: Cluster) -> dict[str, Any]:
    limits = {**({GPU: str(cluster.gpus)} if cluster.gpus else {}), **cluster.resources}
    pod = manifest.fill(
        manifest.template("kubernetes/pod.yaml"),
        {
            "grace": run.spec.stop_grace_seconds + MARGIN_SECONDS,
            "user": cluster.user,
            "group": cluster.group,
            "container": KINDS[cluster.kind].container,
            "image": cluster.image,
            "command": _command(run, KINDS[cluster.kind]),
            "environment": _environment(run, cluster) or None,
            "ports": list(KINDS[cluster.kind].ports) or None,
            "limits": limits or None,
            "capabilities": list(cluster.capabilities) or None,
            "mounts": [mount for _, mount in cluster.volumes],
            "volumes": [volume for volume, _ in cluster.volumes],
            "shared_memory": cluster.shared_memory,
        },
    )
    return fields.merge(pod, dict(cluster.pod))


def _command(run: Run, kind: Kind) -> list[str]:
    """What a pod runs: Kubernetes itself puts the values of its variables in, no shell."""
    rank, rendezvous = f"$({kind.rank})", f"$({kind.address}):$({kind.port})"
    if not kind.restarts_itself:
        return ["bash", literal(str(run.directory.path / JOB_SCRIPT)), rank, rendezvous]
    return [*COMMAND, literal(str(run.directory.path)), "--node-rank", rank, "--rendezvous", rendezvous]


def literal(text: str) -> str:
    """A text in which Kubernetes sees no `$(VARIABLE)`."""
    return text.replace("$", "$$")


def _environment(run: Run, cluster: Cluster) -> list[dict[str, Any]]:
    """A reference for each secret; the node takes all else from the record."""
    hidden = [
        name
        for name, value in secrets.masked(run.command.environment).items()
        if value == secrets.reference(name)
    ]
    if hidden and cluster.secret is None:
        raise PolycomError(
            f"{run.name}: {', '.join(hidden)} would stand in the manifest; put it into a Secret of the "
            "cluster (`kubectl create secret generic NAME --from-env-file=FILE`), named in the site's "
            "`kubernetes`: `secret: NAME`"
        )
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": cluster.secret, "key": name}}}
        for name in hidden
    ]


def _check_shared(run: Run, cluster: Cluster) -> None:
    """Raise PolycomError if the run's directory lies on none of the pods' volumes."""
    writable = [mount["mountPath"] for _, mount in cluster.volumes if not mount.get("readOnly")]
    if not any(run.directory.path.is_relative_to(path) for path in writable):
        raise PolycomError(
            f"{run.name}: {run.directory.path} lies on no volume that the pods may write to "
            f"({', '.join(writable) or 'there is none'}); give an --output on one, or add the volume to the "
            "site's `kubernetes`, as in `volumes: [CLAIM:/data]`"
        )


def _state(run: Run) -> str:
    cluster = Cluster.of(run.site)
    return _ask(cluster.kind, job_name(run), cluster.namespace)


def _ask(kind: str, name: str, namespace: str | None, seconds: float | None = None) -> str:
    """Whether a job is `absent`, `active` or `ended`."""
    where = [] if namespace is None else [f"--namespace={namespace}"]
    asked = ["get", KINDS[kind].plural, name, *where, "--ignore-not-found", "--output=json"]
    said = _kubectl(*asked, seconds=seconds)
    if not said.strip():
        return "absent"
    conditions = json.loads(said).get("status", {}).get("conditions", [])
    ended = any(
        one.get("type") in ("Complete", "Succeeded", "Failed") and one.get("status") == "True"
        for one in conditions
    )
    return "ended" if ended else "active"


def _kubectl(*arguments: str, seconds: float | None = None) -> str:
    try:
        done = subprocess.run(
            ["kubectl", *arguments], capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise PolycomError(f"kubectl has not answered for {seconds} s") from None
    except FileNotFoundError:
        raise PolycomError(
            f"there is no kubectl here; give elsewhere: kubectl {' '.join(arguments)}"
        ) from None
    if done.returncode:
        raise PolycomError(f"kubectl {arguments[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def _present(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
