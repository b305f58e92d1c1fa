"""What a machine has, from real packages, files and clocks; whatever breaks at its import, doctor goes on."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import polycom_ext
from polycom_ext import reference
from polycom_ext.machine import look as machine
from polycom_ext.machine import probe
from polycom_ext.machine.look import Package
from polycom_ext.ops.polynomial import library

Installed = Callable[..., Path]
CRASH = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
TORCH = {"torch/__init__.py": ""}
"""Packages on top of it import it first; this one takes no seconds."""


def test_an_activation_that_differs_from_its_definition_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    definition = reference.prelu
    monkeypatch.setattr(reference, "swish", lambda x, beta: 1.1 * beta * x)
    monkeypatch.setattr(reference, "prelu", lambda x, slope: definition(x, slope.detach() + 0 * slope))
    checked = probe._checked(torch.device("cpu"))
    assert checked["swish"].startswith("y is off by ")
    assert checked["prelu"].startswith("the gradient of slope is off by ")
    assert checked["xielu"] == "plain"
    monkeypatch.setattr(reference, "swish", lambda x, beta: beta * x * torch.nan)
    assert probe._checked(torch.device("cpu"))["swish"] == "y is off by nan"


@pytest.mark.parametrize(
    ("init", "says"),
    [
        (CRASH, "its import crashes (SIGSEGV)"),
        ("raise ImportError('libcudart.so.13: not found')\n", "ImportError: libcudart.so.13: not found"),
        ('print(\'{"version": "9"}\')\nimport nothing_like_it\n', "ModuleNotFoundError: No module named"),
    ],
)
def test_a_torch_that_cannot_be_imported_is_told(installed: Installed, init: str, says: str) -> None:
    """What it prints is not taken for what was found, and the reason is torch's, not the operations'."""
    installed({"torch/__init__.py": init})
    told, operations = machine._torch()
    assert operations == machine.Operations()
    assert told.version is None
    assert told.problem.startswith(says)


TORCH_OF_CUDA = """
from types import SimpleNamespace as Some

def init():
    {init}

__version__ = "9.9"
version = Some(cuda="13.0")
distributed = Some(is_available=lambda: True, is_nccl_available=lambda: {nccl})
properties = Some(name="H100", major=9, minor=0, uuid="1-2", total_memory=7)
cuda = Some(
    init=init,
    nccl=Some(version=lambda: (2, 28, 3)),
    device_count=lambda: 1,
    get_device_properties=lambda index: properties,
)
"""
"""As far as doctor asks it; the package's operations find nothing of a torch in it."""


def test_the_gpus_of_a_torch_and_what_breaks_after_it(installed: Installed) -> None:
    installed({"torch/__init__.py": TORCH_OF_CUDA.format(init="pass", nccl=True)})
    told, operations = machine._torch()
    assert (told.version, told.cuda, told.nccl, told.problem) == ("9.9", "13.0", "2.28.3", "")
    assert told.devices == (machine.Device("H100", "9.0", "GPU-1-2", 7),)
    assert operations.problem.startswith("ImportError: cannot import name")


def test_a_torch_whose_gpus_cannot_be_used(installed: Installed) -> None:
    init = "raise RuntimeError('The driver is too old\\nand more')"
    installed({"torch/__init__.py": TORCH_OF_CUDA.format(init=init, nccl=False)})
    told, _ = machine._torch()
    assert (told.nccl, told.cuda_problem, told.devices) == (None, "The driver is too old", ())


def test_operations_are_checked_on_each_gpu_that_they_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "devices", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(library, "problem", "so and so")
    monkeypatch.setattr(library, "gpu_problem", ["", "no code"].__getitem__)
    monkeypatch.setattr(library, "instruction_set", lambda: "avx2")
    monkeypatch.setattr(library, "cuda_architectures", lambda: ["sm_90"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(probe, "_checked", lambda device: {"on": str(device)})
    told: dict[str, Any] = {}
    probe._torch(told.update)
    assert told["gpu_problems"] == ["", "no code"]
    assert told["checked"] == {"cpu": {"on": "cpu"}, "cuda:0": {"on": "cuda:0"}}
    assert (told["fused_on"], told["fused_problem"]) == (["cpu", "cuda"], "so and so")
    assert (told["instruction_set"], told["architectures"]) == ("avx2", ["sm_90"])


def test_what_is_asked_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is imported in processes of their own finds nothing."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(probe, "ask", lambda what: ({}, f"no {what}"))
    found = machine.look(tmp_path / "runs", ["mine", "apex"])
    assert found.visible_devices == "3"
    assert [one.module for one in found.packages] == [*machine.PACKAGES, "mine"]
    assert (found.folders[0].purpose, found.folders[0].path) == ("runs", str(tmp_path / "runs"))
    assert (found.executable, found.package) == (sys.executable, polycom_ext.__version__)
    assert found.package_path == str(Path(polycom_ext.__file__).parent)
    assert found.python == platform.python_version()
    assert found.system == f"{platform.system()} {platform.release()}, {platform.machine()}"
    assert found.torch.problem == "no torch"


def test_a_package_that_is_not_there(installed: Installed) -> None:
    assert machine.package("flash_attn") == Package("flash_attn")


def test_a_package_of_others_its_version_and_place(installed: Installed) -> None:
    folder = installed({**TORCH, "grouped_gemm/__init__.py": ""}, "grouped_gemm", "1.1.4")
    found = machine.package("grouped_gemm")
    assert found == Package("grouped_gemm", str(folder / "grouped_gemm"), "1.1.4", imported=True)


@pytest.mark.parametrize(
    ("init", "says"),
    [
        (CRASH, "its import crashes (SIGSEGV)"),
        ("raise OSError('undefined symbol: _ZN2at')", "OSError: undefined"),
    ],
)
def test_a_package_whose_import_breaks_keeps_its_version(installed: Installed, init: str, says: str) -> None:
    installed({**TORCH, "flash_attn/__init__.py": init}, "flash-attn", "2.8.3")
    found = machine.package("flash_attn")
    assert (found.version, found.imported) == ("2.8.3", False)
    assert found.problem.startswith(says)


def test_an_import_that_hangs_is_given_up(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed({"flash_attn/__init__.py": "import time; time.sleep(60)", **TORCH})
    monkeypatch.setattr(probe, "SECONDS", 0.5)
    assert machine.package("flash_attn").problem == "its import has not ended in 0.5 s"


def test_a_package_that_ends_the_process_without_a_word(installed: Installed) -> None:
    installed({**TORCH, "flash_attn/__init__.py": "import os; os._exit(3)"})
    assert machine.package("flash_attn").problem == "its import ends with status 3"


def test_a_module_that_is_one_file_and_needs_torch_to_be_there(installed: Installed) -> None:
    folder = installed({**TORCH, "grouped_gemm.py": "import sys; assert 'torch' in sys.modules"})
    found = machine.package("grouped_gemm")
    assert found == Package("grouped_gemm", str(folder / "grouped_gemm.py"), imported=True)


PYPI_APEX = {
    "apex/__init__.py": "from pyramid.interfaces import ISessionFactory\n",
    "apex/lib/flash.py": "",
    "apex/views.py": "",
}
SUMMARY = "Pyramid toolkit to add Velruse, Flash Messages,CSRF, ReCaptcha and Sessions"


def test_apex_of_pypi_is_told_apart_from_nvidias(installed: Installed) -> None:
    installed(PYPI_APEX, "apex", "0.9.10.dev0", SUMMARY)
    found = machine.package("apex")
    assert (found.foreign, found.imported, found.problem) == (SUMMARY, False, "")


def test_an_apex_that_says_nothing_of_itself(installed: Installed) -> None:
    installed({"apex/__init__.py": ""})
    assert machine.package("apex").foreign == "it has no multi_tensor_apply"


def test_apex_of_nvidia(installed: Installed) -> None:
    files = {"apex/__init__.py": "", "apex/multi_tensor_apply/__init__.py": ""}
    installed({**TORCH, **files}, "apex", "0.1")
    found = machine.package("apex")
    assert (found.version, found.foreign, found.imported) == ("0.1", "", True)


@pytest.mark.parametrize(
    "doors",
    [
        (),
        ("register_forward_fusion", "register_backward_fusion"),
        ("register_forward_fusion", "register_backward_fusion", "register_forward_backward_fusion"),
    ],
    ids=("2.12", "2.13", "2.17"),
)
def test_the_extension_api_of_transformer_engine(installed: Installed, doors: tuple[str, ...]) -> None:
    ops = "".join(f"def {door}(): ...\n" for door in doors)
    files = {"__init__.py": "", "pytorch/__init__.py": "from . import ops\n", "pytorch/ops.py": ops}
    files = {f"transformer_engine/{name}": text for name, text in files.items()}
    installed({**TORCH, **files}, "transformer_engine", "2.20.2")
    found = machine.package("transformer_engine.pytorch")
    assert (found.version, found.features, found.imported) == ("2.20.2", doors, True)


def test_a_transformer_engine_without_operations_has_no_extension_api(installed: Installed) -> None:
    files = {f"transformer_engine/{name}": "" for name in ("__init__.py", "pytorch.py")}
    installed({**TORCH, **files}, "transformer_engine", "1.0")
    found = machine.package("transformer_engine.pytorch")
    assert (found.problem, found.features) == ("", ())


def test_nvcc_is_compared_with_torchs_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert machine._nvcc(machine.Torch("2.14", "12.6")) == machine.Compiler(str(nvcc), "12.4")
    other = machine._nvcc(machine.Torch("2.14", "13.0"))
    assert (other.path, other.release) == (str(nvcc), "12.4")
    assert "of CUDA 12.4 but torch of CUDA 13.0" in other.problem
    nvcc.write_text("#!/bin/sh\necho of a release that it does not tell\n")
    assert machine._nvcc(machine.Torch("2.14", "13.0")) == machine.Compiler(str(nvcc))
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    assert machine._nvcc(machine.Torch("2.14", "13.0")).problem.startswith("nvcc failed")


def test_no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert machine._nvcc(machine.Torch()) == machine.Compiler(None)


def test_a_folder_that_is_not_made_yet_is_judged_by_the_one_above(tmp_path: Path) -> None:
    found = machine.folder("runs", tmp_path / "outputs" / "small")
    assert found.writable
    assert 0 < found.free < 1 << 60
    (tmp_path / "file").touch(mode=0o755)
    assert not machine.folder("runs", tmp_path / "file" / "small").writable
    assert not machine.folder("runs", Path("/proc/outputs")).writable or os.access("/proc", os.W_OK)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_of_another_user_cannot_be_written(tmp_path: Path) -> None:
    for above in (tmp_path, *tmp_path.parents):
        if above.stat().st_uid == 0 and above != Path("/") and above.name.startswith("pytest"):
            above.chmod(0o755)
    child = os.fork()
    if child == 0:
        os.setuid(12345)
        found = machine.folder("runs", tmp_path / "outputs")
        os._exit(2 * (found.path != str(tmp_path / "outputs")) + found.writable)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_where_a_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    places = {one.purpose: (one.path, one.problem) for one in machine._folders(Path("runs"))}
    assert places == {
        "runs": (str(tmp_path / "runs"), ""),
        "cache": (str(tmp_path / "cache"), ""),
        "temporary files": (str(tmp_path / "temporary"), ""),
        "shared memory": (str(tmp_path), ""),
    }
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
    assert "shared memory" not in {one.purpose for one in machine._folders(Path("runs"))}


def test_a_user_without_a_home_whose_cache_is_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POLYCOM_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4711)  # which is in no passwd, and owns nothing here
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "polycom-cache-4711").mkdir()
    cache = {one.purpose: one for one in machine._folders(tmp_path)}["cache"]
    assert (cache.path, cache.writable) == ("", False)
    assert "POLYCOM_CACHE" in cache.problem


def test_no_place_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("[Errno 2] No usable temporary directory found in ['/tmp']")

    monkeypatch.delenv("POLYCOM_CACHE", raising=False)
    monkeypatch.setattr(tempfile, "gettempdir", none)
    found = {one.purpose: one.problem for one in machine._folders(tmp_path)}
    assert "No usable temporary directory" in found["cache"]
    assert found["temporary files"].endswith("set TMPDIR to one")
    assert found["runs"] == ""


def test_the_clock_is_set_beside_the_files_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "old.py").touch()
    (tmp_path / "new.py").touch()
    os.utime(tmp_path / "old.py", (1e9, 1e9))
    os.utime(tmp_path / "new.py", (9e9, 9e9))
    assert machine.clock(tmp_path / "nothing").newest_file == 0
    found = machine.clock(tmp_path)
    assert found.newest_file == 9e9
    assert abs(found.now - time.time()) < 60


@pytest.mark.parametrize("lacking", ["the function", "the library"])
def test_without_the_kernels_word_nothing_is_known_of_the_clock(
    lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on systems other than Linux."""
    (tmp_path / "empty.c").write_text("int nothing;\n")
    assert os.system(f"cc -shared -o {tmp_path / 'empty.so'} {tmp_path / 'empty.c'}") == 0
    library = {"the function": tmp_path / "empty.so", "the library": tmp_path / "nowhere.so"}[lacking]
    load = machine.ctypes.CDLL
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: load(str(library)))
    assert machine.clock(tmp_path).synchronised is None


@pytest.mark.skipif(sys.platform != "linux", reason="adjtimex is Linux's")
def test_the_kernel_is_asked_whether_the_clock_is_synchronised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a C library of which only the one function is another's."""
    for state, told in ((0, True), (5, False), (-1, None)):
        (tmp_path / "clock.c").write_text(f"int adjtimex(void *timex) {{ return timex ? {state} : 99; }}\n")
        library = tmp_path / f"clock{state}.so"
        assert os.system(f"cc -shared -o {library} {tmp_path / 'clock.c'}") == 0
        load = machine.ctypes.CDLL
        monkeypatch.setattr(
            machine.ctypes, "CDLL", lambda name, library=library, load=load: load(str(library))
        )
        assert machine.clock(tmp_path).synchronised is told
        monkeypatch.undo()
