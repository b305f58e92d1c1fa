"""The C++ helper of Megatron-LM's datasets, compiled for the Python that runs.

core/datasets/utils.py runs `make` at every start, with whatever `python3` it finds first. megatron-core's
wheel has no Makefile, and its helper compiled for one version of Python: there upstream ends.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import sysconfig
from importlib import import_module
from pathlib import Path
from typing import Any

from polycom_ext.errors import PolycomError
from polycom_ext.ops import build


def enable() -> None:
    """Megatron, which is imported, takes the helper that is there, and compiles one where none is."""
    utils: Any = import_module("megatron.core.datasets.utils")
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        utils.compile_helpers = lambda: None
    else:
        utils.compile_helpers = functools.partial(compile_into, Path(utils.__file__).parent)


def compile_into(folder: Path) -> None:
    """As upstream's Makefile does; raises PolycomError without pybind11 or a C++ compiler."""
    library = folder / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    partial = folder / f".{library.name}.{os.getpid()}"
    try:
        include = build.run([sys.executable, "-m", "pybind11", "--includes"]).split()
        flags = ["-O3", "-shared", "-std=c++17", "-fPIC", *include]
        build.run([build.find_cxx(), *flags, str(folder / "helpers.cpp"), "-o", str(partial)])
        partial.replace(library)
    except build.BuildError as error:
        raise PolycomError(
            "Megatron's data helpers must be compiled for this Python, by pybind11 and a C++ compiler: "
            f"{error.sentence}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
