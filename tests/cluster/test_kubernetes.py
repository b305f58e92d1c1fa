"""A manifest is what the published schemas allow, and its command trains where a pod's variables are set."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from polycom_ext.cli import main

from ..runs.conftest import register
from ..runs.conftest import write_spec as write_toy
from ..runs.kubelet import expanded
from ..runs.test_kubernetes import KINDS, pods
from ..runs.test_training import metrics, write_spec

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="see requirements-cluster.txt")
client = pytest.importorskip("kubernetes.client", reason="see requirements-cluster.txt")
training = pytest.importorskip("kubeflow.training.models", reason="see requirements-cluster.txt")
trainer = pytest.importorskip("kubeflow_trainer_api.models", reason="see requirements-cluster.txt")

pytestmark = pytest.mark.cluster

VERSIONS = ("1.29", "1.37")
"""Of Kubernetes: an old one, and the newest of which there are schemas."""
EVERYTHING = {
    "namespace": "research",
    "gpus": 8,
    "resources": {"rdma/hca": 1, "memory": "800Gi"},
    "volumes": ["claim:/", {"path": "/data", "read_only": True, "nfs": {"server": "filer", "path": "/x"}}],
    "shared_memory": "64Gi",
    "secret": "keys",
    "user": "1000:100",
    "capabilities": ["IPC_LOCK"],
    "labels": {"kueue.x-k8s.io/queue-name": "short"},
    "pod": {"nodeSelector": {"gpu": "a100"}, "hostNetwork": True},
}


def planned(folder: Path, kind: str, spec: Path, keys: dict[str, Any], monkeypatch: Any) -> list[Any]:
    """The documents of a manifest that is planned where there is no kubectl."""
    site = {"backend": "kubernetes", "container": {"image": "image"}, "kubernetes": {**keys, "kind": kind}}
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    command = ["run", str(spec), "--nodes", "2", "--site", str(folder / "site.yaml")]
    git, found = folder / "bin" / "git", shutil.which("git")
    assert found is not None
    git.parent.mkdir()
    git.symlink_to(found)
    with monkeypatch.context() as without_kubectl:
        without_kubectl.setenv("PATH", str(git.parent))
        assert main([*command, "--output", str(folder / "run")]) == 0
    return list(yaml.safe_load_all((folder / "run" / "job.yaml").read_text()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", [{"volumes": ["claim:/"]}, EVERYTHING], ids=["least", "everything"])
def test_a_manifest_is_what_the_published_schemas_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, keys: dict[str, Any]
) -> None:
    spec = write_spec(tmp_path, "base-dense.yaml", "polynorm")
    job = planned(tmp_path, kind, spec, keys, monkeypatch)
    if kind == "TrainJob":
        models = (trainer.TrainerV1alpha1TrainingRuntime, trainer.TrainerV1alpha1TrainJob)
        for document, model in zip(job, models, strict=True):
            assert model.from_dict(document).to_dict() == document  # it drops what it does not know
        [nodes] = job[0]["spec"]["template"]["spec"]["replicatedJobs"]
        batch = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {}, "spec": nodes["template"]["spec"]}
        for version in VERSIONS:
            kubernetes_validate.validate(batch, version, strict=True)
    else:
        for name in filter(lambda name: name.startswith("KubeflowOrg"), dir(training)):
            monkeypatch.setattr(client.models, name, getattr(training, name), raising=False)
        [document] = job
        answer = type("Answer", (), {"data": json.dumps(document)})
        api = client.ApiClient()
        read = api.deserialize(answer, training.KubeflowOrgV1PyTorchJob)
        assert api.sanitize_for_serialization(read) == document
    for spec_of_pod in pods(job):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": spec_of_pod}
        for version in VERSIONS:
            kubernetes_validate.validate(pod, version, strict=True)


def environments(kind: str, port: int) -> list[dict[str, str]]:
    """What the operators set in the pods of two nodes."""
    if kind == "TrainJob":
        shared = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_PORT": str(port)}
        place = [{"PET_NODE_RANK": rank, "PET_MASTER_ADDR": "127.0.0.1"} for rank in "01"]
    else:
        shared = {"WORLD_SIZE": "2", "PYTHONUNBUFFERED": "0", "MASTER_PORT": str(port)}
        place = [{"RANK": rank, "MASTER_ADDR": "127.0.0.1"} for rank in "01"]
    return [{**shared, **one} for one in place]


def plain_spec(folder: Path, kind: str) -> Path:
    """Of Megatron in a TrainJob; of the toy trainer in a PyTorchJob, which differs in how nodes start."""
    if kind == "PyTorchJob":
        return Path(write_toy("small", 1, {"steps": 3}))
    options = {"train_iters": 3, "tensor_model_parallel_size": 2}
    return write_spec(folder, "base-dense.yaml", "polynorm", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_of_a_pod_trains_with_what_the_operator_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    register(monkeypatch, tmp_path)
    spec, plain = plain_spec(tmp_path, kind), tmp_path / "plain"
    assert main(["run", str(spec), "--output", str(plain), "--processes-per-node", "2"]) == 0
    job = planned(tmp_path, kind, spec, {"volumes": [f"claim:{tmp_path}"]}, monkeypatch)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    of_the_image = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.environ["PYTHONPATH"],
    }
    started = []
    for pod, variables in zip(pods(job) * 2, environments(kind, port), strict=False):
        command = [expanded(word, variables) for word in pod["containers"][0]["command"]]
        started.append(
            subprocess.Popen(
                command, env={**of_the_image, **variables}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
        )
    ended = [(node.communicate(timeout=180)[1], node.returncode) for node in started]
    assert [status for _, status in ended] == [0, 0], ended
    assert metrics(tmp_path / "run") == metrics(plain)
    assert len(metrics(plain)) == 3
