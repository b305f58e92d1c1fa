"""Builds the fused operations with the package where torch and a compiler are there; else pure Python.

Everything declarative is in pyproject.toml, the compiling in polycom_ext/ops/build.py. Build isolation hides
the installed torch: use `pip install . --no-build-isolation`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


def _load_build() -> ModuleType:
    path = Path(__file__).parent / "polycom_ext" / "ops" / "build.py"
    spec = importlib.util.spec_from_file_location("polycom_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = _load_build()


class Package(build_py):
    """Takes the folders at the top into the package; an editable one finds them where they are."""

    FOLDERS = ("patches", "configs", "launch", "docker")

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._shipped():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *(target for _, target in self._shipped())]

    def _shipped(self) -> list[tuple[str, str]]:
        top = Path(__file__).parent
        found = sorted(path for name in self.FOLDERS for path in (top / name).rglob("*") if path.is_file())
        inside = Path(self.build_lib, "polycom_ext")
        return [(str(path), str(inside / path.relative_to(top))) for path in found]


class BuildOperations(build_ext):
    """Compiles by build.py; a failure leaves the pure Python package, and a note that its first use shows.

    Where POLYCOM_BUILD_CUDA=1 asks for the CUDA operations, theirs ends the installation.
    """

    def build_extension(self, ext: Extension) -> None:
        cuda = ext.name.endswith("_cuda")
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.unlink(missing_ok=True)  # one of other sources would be refused
        try:
            sources = build.FAMILIES[ext.name.split(".")[-2]] / "csrc"
            (build.build_cuda if cuda else build.build_cpu)(sources, library, build.Torch.find())
        except build.BuildError as error:
            if cuda and build.cuda_demanded():
                raise SystemExit(f"polycom-ext: POLYCOM_BUILD_CUDA is set, but {error}") from error
            build.note_failure(library, error)
            print(f"polycom-ext: {ext.name} was not built, plain torch operations serve instead: {error}")

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


class AnyPythonWheel(bdist_wheel):
    """The libraries use no Python API, so one wheel serves every Python of its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _extensions() -> list[Extension]:
    if os.environ.get("POLYCOM_BUILD_OPERATIONS") == "0":  # the Makefile builds them by themselves
        return []
    try:
        cuda = build.wants_cuda(build.Torch.find())
    except build.BuildError:
        cuda = build.cuda_demanded()  # then the build says what is missing
    names = ["_cpu", "_cuda"] if cuda else ["_cpu"]
    modules = [f"polycom_ext.ops.{family}.{name}" for family in build.FAMILIES for name in names]
    return [Extension(module, sources=[], optional=True) for module in modules]


setup(
    ext_modules=_extensions(),
    cmdclass={"build_py": Package, "build_ext": BuildOperations, "bdist_wheel": AnyPythonWheel},
)
