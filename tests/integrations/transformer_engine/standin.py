"""Transformer Engine's real Python over a stand-in for its compiled module, so that it runs without a GPU.

`install(sources)` lets `import transformer_engine` find an unpacked `transformer-engine` wheel, and the
compiled module and the others that no test makes use of: packages for debugging, TE's ONNX export and Triton
kernels. The names that TE only mentions (enumerations it compares, kernels it may call) are `Placeholder`s,
which raise when called. What the tests do call torch forms, in kernels.py. `without_driver()` puts these
functions where a compiled module, the real one too, has kernels.
"""

from __future__ import annotations

import enum
import functools
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.integrations.transformer_engine import fp8
from tests.integrations.transformer_engine.kernels import KERNELS, TRITON

COMPILED = "transformer_engine_torch"
UNUSED = ("nvdlfw_inspect", "transformer_engine.pytorch.onnx_extensions", "transformer_engine.pytorch.triton")


class Placeholder:
    """Stands for a name of a compiled module: has any attribute, and raises when it is called."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], types.FunctionType | type):
            return args[0]  # as a decorator
        raise NotImplementedError(f"{self.__name__} has no stand-in")

    def __int__(self) -> int:
        return 0

    @property
    def __members__(self) -> Members:
        return Members(self.__name__.rpartition(".")[2])


class Members:
    """Of an enumeration that TE compares at import with its Python twin: whatever the twin has."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __iter__(self) -> Iterator[str]:
        prefix = "NVTE_" if self.name.startswith("NVTE_") else ""
        said = self.name.replace("NVTE_", "").replace("_", "")
        caller = sys._getframe(1).f_globals
        twins = [v for v in caller.values() if isinstance(v, type) and issubclass(v, enum.Enum)]
        twin = next((twin for twin in twins if twin.__name__ in said), None)
        return iter([f"{prefix}{member.name}" for member in twin or ()])


class PlaceholderModule(types.ModuleType):
    __path__ = []  # noqa: RUF012
    __file__ = "<stand-in>"

    def __getattr__(self, name: str) -> Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        made = Placeholder(f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of UNUSED, and any module in them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not f"{fullname}.".startswith(tuple(f"{name}." for name in UNUSED)):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return PlaceholderModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class DType(enum.IntEnum):
    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class FP8FwdTensors(enum.IntEnum):
    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_INPUT = 6
    GEMM3_WEIGHT = 7
    GEMM3_OUTPUT = 8


class FP8BwdTensors(enum.IntEnum):
    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


class FP8TensorMeta:
    def __init__(self) -> None:
        self.scale = self.scale_inv = self.amax_history = None


REAL: dict[str, Any] = {}
"""What stood where a kernel of KERNELS or TRITON stands now."""
TYPES = (DType, FP8FwdTensors, FP8BwdTensors, FP8TensorMeta)


def install(sources: Path) -> None:
    """Let `import transformer_engine` find the unpacked wheel in `sources`."""
    tex = PlaceholderModule(COMPILED)
    tex.__spec__ = importlib.machinery.ModuleSpec(COMPILED, None)
    for one in (*TYPES, *KERNELS, *fp8.KERNELS):  # present at import, for whoever imports all there is
        setattr(tex, one.__name__, one)
    sys.modules[COMPILED] = tex
    sys.meta_path.insert(0, Finder())
    # Not its __init__, which loads libraries of CUDA before anything.
    package = types.ModuleType("transformer_engine")
    package.__path__ = [str(sources / "transformer_engine")]
    package.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None, is_package=True)
    package.__version__ = next(sources.glob("*.dist-info")).stem.partition("-")[2]  # type: ignore
    sys.modules["transformer_engine"] = package
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # TE's own: these libraries are not looked for later either
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # and what it can do by torch itself it does
    os.environ["NVTE_MASKED_SOFTMAX_FUSION"] = "0"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    common: Any = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None


def without_driver() -> None:
    """Import Transformer Engine, and let torch form what its compiled module, real or not, has a GPU do."""
    if REAL:  # done before
        return
    for name in ("ops", "cpp_extensions.gemm", "utils", "quantization"):
        importlib.import_module(f"transformer_engine.pytorch.{name}")
    compiled = importlib.import_module(COMPILED)
    REAL.update({one.__name__: getattr(compiled, one.__name__) for one in KERNELS})
    theirs = [module for name, module in sys.modules.items() if name.startswith("transformer_engine")]
    everywhere: dict[str, Any] = {one.__name__: one for one in (*KERNELS, *TRITON)}
    everywhere |= {
        "_empty_tensor": lambda: torch.empty(0),
        "get_device_compute_capability": lambda: (9, 0),
        "is_non_tn_fp8_gemm_supported": lambda: False,
    }
    for module in theirs:  # some import the function, not the module
        for name, function in everywhere.items():
            if name in vars(module):
                REAL.setdefault(name, getattr(module, name))
                setattr(module, name, function)
    replaced: dict[str, Any] = {
        "cpp_extensions.gemm.get_cublas_workspace": lambda *_: torch.empty(1, 1, dtype=torch.uint8),
        "quantization.check_recipe_support": lambda recipe: None,
        "quantization.check_fp8_block_scaling_support": lambda: (True, ""),
        "quantization.check_mxfp8_support": lambda: (True, ""),
        "attention.dot_product_attention.utils.get_cudnn_version": lambda: (9, 10, 0),
    }
    for path, function in replaced.items():
        place, _, name = path.rpartition(".")
        setattr(sys.modules[f"transformer_engine.pytorch.{place}"], name, function)
    torch.cuda.is_current_stream_capturing = lambda: False
    layers = importlib.import_module("transformer_engine.pytorch")
    layer, attention = layers.module.base.TransformerEngineBaseModule, layers.DotProductAttention
    for kind, name in ((layer, "__init__"), (layer, "prepare_forward"), (attention, "forward")):
        setattr(kind, name, _as_if_on_a_gpu(getattr(kind, name)))


def name_a_device() -> None:
    """Let torch.cuda tell of one Hopper, as TE's layers ask; after the rehearsal, which has none."""
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)


def gather_together() -> None:
    """Let gloo, which can begin no batch of any operations on a device, gather what TE gathers at once.

    That is a quantised tensor's bytes and scales, which it can without a device's being named.
    """
    c10d: Any = torch.distributed
    coalesce = c10d._coalescing_manager

    def without_device(group: Any = None, device: Any = None, async_ops: bool = False) -> Any:
        return coalesce(group, None, async_ops)

    c10d._coalescing_manager = without_device


def _as_if_on_a_gpu(check: Callable[..., Any]) -> Callable[..., Any]:
    """`check`, in which TE asserts that there is a GPU, or that a tensor lies on it."""

    @functools.wraps(check)
    def passes(*args: Any, **kwargs: Any) -> Any:
        with (
            mock.patch.object(torch.cuda, "is_available", return_value=True),
            mock.patch.object(torch.Tensor, "is_cuda", True, create=True),
        ):
            return check(*args, **kwargs)

    return passes
