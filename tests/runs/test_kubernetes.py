"""A run as a job of Kubeflow's: what the manifest says, and what kubectl is asked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from polycom_ext.cli import main

RUN = Path("outputs/small")
KINDS = ("TrainJob", "PyTorchJob")


@pytest.fixture
def manifest(
    toy_spec: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """Plan a run on two nodes, with these keys of a site's `kubernetes` and without kubectl; its manifest."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def rendered(*more: str, site: dict[str, Any] | None = None, **keys: Any) -> list[dict[str, Any]]:
        content = {
            "backend": "kubernetes",
            "container": {"image": "registry/image@sha256:0"},
            "max_restarts": 4,
            "kubernetes": {"volumes": [f"claim:{tmp_path}"], **keys},
            **(site or {}),
        }
        Path("site.yaml").write_text(yaml.safe_dump(content))
        status = main(["run", toy_spec(processes=8, steps=1), "--site", "site.yaml", "--nodes", "2", *more])
        return list(yaml.safe_load_all((RUN / "job.yaml").read_text())) if status == 0 else []

    return rendered


def pods(job: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The specifications of pods in a manifest."""
    if job[-1]["kind"] == "PyTorchJob":
        return [one["template"]["spec"] for one in job[-1]["spec"]["pytorchReplicaSpecs"].values()]
    [nodes] = job[0]["spec"]["template"]["spec"]["replicatedJobs"]
    return [nodes["template"]["spec"]["template"]["spec"]]


def test_a_train_job_starts_a_pod_a_node_which_knows_its_place(
    manifest: Callable[..., list[dict[str, Any]]],
) -> None:
    runtime, job = manifest()
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["trainer"] == {"numNodes": 2, "numProcPerNode": 8}
    assert pods([runtime, job])[0]["containers"][0]["command"] == [
        *("polycom", "node", str(RUN.absolute())),
        *("--node-rank", "$(PET_NODE_RANK)", "--rendezvous", "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)"),
    ]


def test_a_train_job_restarts_all_pods_but_not_after_a_refusal(
    manifest: Callable[..., list[dict[str, Any]]],
) -> None:
    runtime, _ = manifest()
    jobs = runtime["spec"]["template"]["spec"]
    assert jobs["failurePolicy"]["maxRestarts"] == 4
    [rule] = jobs["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    node = jobs["replicatedJobs"][0]["template"]["spec"]
    assert node["backoffLimit"] == 0
    [rule] = node["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert rule["onExitCodes"]["containerName"] == pods([runtime])[0]["containers"][0]["name"]


def test_a_pytorch_job_is_a_master_and_workers_whose_nodes_restart_themselves(
    manifest: Callable[..., list[dict[str, Any]]],
) -> None:
    [job] = manifest("--set", "stop_grace_seconds=45", kind="PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: (one["replicas"], one["restartPolicy"]) for name, one in replicas.items()} == {
        "Master": (1, "Never"),
        "Worker": (1, "Never"),
    }
    for pod in pods([job]):
        assert pod["terminationGracePeriodSeconds"] == 75
        script = str(RUN.absolute() / "job.sh")
        assert pod["containers"][0]["command"] == ["bash", script, "$(RANK)", "$(MASTER_ADDR):$(MASTER_PORT)"]
    [alone] = manifest("--nodes", "1", kind="PyTorchJob")
    assert list(alone["spec"]["pytorchReplicaSpecs"]) == ["Master"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pod_has_what_the_site_says(manifest: Callable[..., list[dict[str, Any]]], kind: str) -> None:
    job = manifest(
        kind=kind,
        namespace="research",
        gpus=8,
        resources={"rdma/hca": 1},
        volumes=["claim:/", {"path": "/data", "read_only": True, "nfs": {"server": "filer", "path": "/x"}}],
        shared_memory="64Gi",
        user="1000:100",
        capabilities=["IPC_LOCK"],
        labels={"kueue.x-k8s.io/queue-name": "short"},
        pod={"nodeSelector": {"on": "y"}, "terminationGracePeriodSeconds": 60},
    )
    for part in job:
        assert part["metadata"]["namespace"] == "research"
        assert part["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "short"}
    for pod in pods(job):
        [container] = pod["containers"]
        assert container["image"] == "registry/image@sha256:0"
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "rdma/hca": "1"}
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
        mounted = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
        assert mounted == {"shm": "/dev/shm", "volume-0": "/", "volume-1": "/data"}
        shm, claim, nfs = pod["volumes"]
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
        assert claim["persistentVolumeClaim"] == {"claimName": "claim"}
        assert nfs["nfs"] == {"server": "filer", "path": "/x"}
        user = pod["securityContext"]
        assert (user["runAsNonRoot"], user["runAsUser"], user["runAsGroup"]) == (True, 1000, 100)
        assert pod["nodeSelector"] == {"on": "y"}
        assert pod["terminationGracePeriodSeconds"] == 60


@pytest.mark.parametrize("kind", KINDS)
def test_a_secret_is_taken_from_the_clusters_own(
    manifest: Callable[..., list[dict[str, Any]]], capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    hidden = ["--set", "environment.HF_TOKEN=hunter2"]
    assert manifest(*hidden, kind=kind) == []
    assert "HF_TOKEN would stand in the manifest" in capfd.readouterr().err
    job = manifest(*hidden, kind=kind, secret="keys", site={"environment": {"WANDB_API_KEY": "hunter3"}})
    for pod in pods(job):
        references = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in pod["containers"][0]["env"]}
        assert references == {name: {"name": "keys", "key": name} for name in ("WANDB_API_KEY", "HF_TOKEN")}
    for path in RUN.rglob("*"):
        assert path.is_dir() or b"hunter" not in path.read_bytes()


@pytest.mark.parametrize(
    ("keys", "site", "sentence"),
    [
        ({"knd": "TrainJob"}, {}, "unknown key 'knd' (did you mean 'kind'?)"),
        ({"kind": "Trainjob"}, {}, "unknown kind 'Trainjob' (did you mean 'TrainJob'?)"),
        ({"namespace": "a b"}, {}, "namespace 'a b' must be small letters"),
        ({"user": 0}, {}, "user '0' must be UID or UID:GID, and not root's"),
        ({"volumes": ["claim:/data"]}, {}, "lies on no volume that the pods may write to (/data)"),
        ({"volumes": ["claim:/:ro"]}, {}, "lies on no volume that the pods may write to (there is none)"),
        ({"volumes": ["claim"]}, {}, "volumes: 'claim' is neither CLAIM:/PATH[:ro] nor"),
        ({"pod": {"containers": []}}, {}, "pod.containers is polycom's to fill in"),
        ({}, {"container": None}, "the pods need an image that has polycom in it"),
        ({}, {"setup": ["module load cuda"]}, "`setup` lines run outside a container"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_manifest_can_say_is_refused(
    manifest: Callable[..., list[dict[str, Any]]],
    capfd: pytest.CaptureFixture[str],
    keys: dict[str, Any],
    site: dict[str, Any],
    sentence: str,
) -> None:
    assert manifest(site=site, **keys) == []
    [line] = capfd.readouterr().err.splitlines()
    assert sentence in line
    assert not (RUN / "job.yaml").exists()


KUBECTL = """#!/bin/sh
for word; do printf '%s ' "$word" >> "$KUBECTL_TOLD"; done
echo >> "$KUBECTL_TOLD"
[ "$1" != get ] || cat "$KUBECTL_KNOWS"
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
    """A kubectl that knows one job, in this state, and writes down what it is asked."""
    told, knows = tmp_path / "told", tmp_path / "knows"
    monkeypatch.setenv("KUBECTL_TOLD", str(told))
    monkeypatch.setenv("KUBECTL_KNOWS", str(knows))
    command = tmp_path / "kubectl"
    command.write_text(KUBECTL)
    command.chmod(0o755)

    def asked(status: Any = None) -> list[str]:
        before = told.read_text().splitlines() if told.exists() else []
        told.unlink(missing_ok=True)
        knows.write_text("" if status is None else json.dumps({"status": status}))
        return [line.split()[0] for line in before]

    asked()
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return asked


ENDED = {"conditions": [{"type": "Failed", "status": "True"}]}


def test_a_job_is_handed_over_once_and_again_after_its_end(
    manifest: Callable[..., list[dict[str, Any]]],
    kubectl: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    path = f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"
    monkeypatch.setenv("PATH", path)
    assert manifest()
    assert f"`polycom stop {RUN.absolute()}` ends it" in capfd.readouterr().out
    assert kubectl({"conditions": [{"type": "Created", "status": "True"}]}) == ["get", "get", "create"]
    assert manifest() == []
    assert "is in the cluster already" in capfd.readouterr().err
    assert kubectl(ENDED) == ["get"]
    assert manifest()
    assert kubectl(ENDED) == ["get", "get", "delete", "create"]
    assert main(["stop", str(RUN)]) == 0
    assert kubectl() == ["get", "delete"]
    assert main(["stop", str(RUN)]) == 2
    assert "nothing to stop" in capfd.readouterr().err


def test_without_kubectl_the_command_is_told(
    manifest: Callable[..., list[dict[str, Any]]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert manifest()
    assert f"kubectl create -f {RUN.absolute()}/job.yaml" in capfd.readouterr().out
