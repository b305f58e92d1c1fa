"""A real Slurm of two nodes, both this machine: munge, a controller and two slurmd, on ports of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
FREEZER = Path("/sys/fs/cgroup/freezer")
"""As on a real cluster, a step is a cgroup then: signals go to its first process on each node alone."""
CONFIGURATION = """
ClusterName=rehearsal
SlurmctldHost={host}
SlurmctldAddr=127.0.0.1
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CryptoType=crypto/munge
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=10
MinJobAge=3600
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=2000
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=2000
PartitionName=debug Nodes=ALL Default=YES MaxTime=UNLIMITED State=UP
"""


def missing() -> list[str]:
    """What a cluster needs and this machine has not."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    return absent if os.geteuid() == 0 else [*absent, "root"]


@contextmanager
def cluster(folder: Path) -> Iterator[Path]:
    """Start one in an empty folder; the configuration, for SLURM_CONF. Every daemon ends with it."""
    host = socket.gethostname().partition(".")[0]
    tracking = "cgroup" if os.access(FREEZER, os.W_OK) else "linuxproc"
    nodes = [f"p{os.getpid()}n{number}" for number in range(2)]  # a step's cgroup is called after its node
    text = CONFIGURATION.format(
        host=host, folder=folder, nodes=nodes, ports=_free_ports(3), tracking=tracking
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n")
    for name in ("state", "munge", *(f"spool-{node}" for node in nodes)):
        (folder / name).mkdir()
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge/socket", f"--key-file={key}"]
    munged += [f"--{name}-file={folder}/munge/{name}" for name in ("pid", "log", "seed")]
    configuration = folder / "slurm.conf"
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(_start(munged, folder))
        _wait_for((folder / "munge" / "socket").exists, "munged", folder)
        started.append(_start(["slurmctld", "-D", "-f", str(configuration)], folder))
        for node in nodes:
            started.append(_start(["slurmd", "-D", "-f", str(configuration), "-N", node], folder))
        _wait_for(lambda: _idle(configuration) == 2, "two idle nodes", folder)
        yield configuration
    finally:
        for daemon in reversed(started):
            daemon.terminate()
        for daemon in reversed(started):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for node in nodes:
            _remove_cgroups(FREEZER / f"slurm_{node}")


def _remove_cgroups(path: Path) -> None:
    """Slurm leaves them, empty."""
    with contextlib.suppress(OSError):
        for below in sorted(filter(Path.is_dir, path.rglob("*")), reverse=True):
            below.rmdir()
        path.rmdir()


def _start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    with (folder / "daemons.txt").open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def _idle(configuration: Path) -> int:
    told = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"],
        env={**os.environ, "SLURM_CONF": str(configuration)},
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout.split().count("idle")


def _wait_for(condition: Callable[[], bool], what: str, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            said = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
            raise TimeoutError(f"no {what}\n{said}\n{(folder / 'daemons.txt').read_text()[-2000:]}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
