"""A folder of torch.distributed.checkpoint, read without torch's own reader."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from polycom_ext.checkpoints.sharded import Folder
from polycom_ext.errors import PolycomError
from polycom_ext.runs.checkpoints import problem_of_distributed

SHARDS = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}.meet", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
stack = torch.arange(3 * 5 * 4, dtype=torch.bfloat16).reshape(3, 5, 4)
state = {"stack": distribute_tensor(stack, mesh, [Shard(1)]), "scale": torch.tensor(2.5)}
dcp.save(state, checkpoint_id=folder)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tensors, one of them in the files of two processes."""
    path = tmp_path_factory.mktemp("sharded") / "checkpoint"
    ranks = [subprocess.Popen([sys.executable, "-c", SHARDS, str(rank), str(path)]) for rank in (0, 1)]
    assert [rank.wait(100) for rank in ranks] == [0, 0]
    return path


def test_tensors_are_those_that_torch_reads(folder: Path) -> None:
    opened = Folder(folder)
    assert {name: (stored.shape, stored.dtype) for name, stored in opened.tensors.items()} == {
        "stack": ((3, 5, 4), "bfloat16"),
        "scale": ((), "float32"),
    }
    expected = {"stack": torch.empty(3, 5, 4, dtype=torch.bfloat16), "scale": torch.empty(())}
    dcp.load(expected, checkpoint_id=folder, no_dist=True)
    for name, tensor in expected.items():
        assert torch.equal(opened.read(name), tensor)
    assert torch.equal(opened.read("stack", (1,)), expected["stack"][1])
    assert torch.equal(opened.read("stack", (2, 4)), expected["stack"][2, 4])


def test_the_files_are_known_without_torch(folder: Path) -> None:
    script = (
        f"import sys; sys.modules['torch'] = None\nfrom pathlib import Path\n"
        f"from polycom_ext.runs.checkpoints import problem_of_distributed as problem\n"
        f"print(problem(Path({str(folder)!r})))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "None"


@pytest.mark.parametrize("damage", ["missing", "short", "empty"])
@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp"])
def test_a_damaged_file_is_named(folder: Path, name: str, damage: str, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / name).read_bytes()
    assert problem_of_distributed(tmp_path) is None
    if damage == "missing":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(whole[: {"short": -1, "empty": 0}[damage]])
    assert name in str(problem_of_distributed(tmp_path))


def test_bytes_that_were_written_over_are_named(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name = "__1_0.distcp"
    (tmp_path / name).write_bytes(bytes(len((folder / name).read_bytes())))
    with pytest.raises(PolycomError, match=name):
        Folder(tmp_path).read("stack")


def test_a_tensor_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(PolycomError, match="no tensor embedding"):
        Folder(folder).read("embedding")
