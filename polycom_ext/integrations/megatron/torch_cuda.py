"""torch.cuda's names, and "cuda" as a device, answered by the CPU.

For trainers that call torch.cuda throughout: one device, one stream on which everything is already done, the
CPU's generator, no memory statistics. Tensors asked for on "cuda" are made on the CPU. Only names that
trainers use.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")

FACTORIES = (
    "arange as_tensor empty empty_like empty_strided eye full full_like linspace ones ones_like rand "
    "rand_like randint randn randn_like randperm tensor tril_indices triu_indices zeros zeros_like"
).split()
TENSOR_FACTORIES = "new_empty new_full new_ones new_tensor new_zeros".split()
NOTHING_TO_DO = (
    "check_error empty_cache ipc_collect reset_peak_memory_stats set_device set_stream synchronize _lazy_init"
).split()
ALWAYS_ZERO = (
    "clock_rate device_memory_used max_memory_allocated max_memory_reserved memory_allocated memory_reserved "
    "power_draw temperature utilization"
).split()


class Stream:
    """A stream on which all work is done by the time anybody asks."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: Any) -> None: ...


class Event:
    """The moment at which it was recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.record()

    def record(self, *args: Any) -> None:
        self.seconds = time.perf_counter()

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`."""
        return (end.seconds - self.seconds) * 1e3


class _Generators:
    """Every device's default generator is the CPU's."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


class _DeviceProperties:
    name = "cpu"
    major = minor = 0
    multi_processor_count = os.cpu_count()
    total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _on_cpu(device: Any) -> Any:
    """CPU for whatever names a CUDA device ("cuda", "cuda:0", 0); anything else as it is."""
    if isinstance(device, bool):
        return device
    if isinstance(device, int) or (isinstance(device, torch.device) and device.type == "cuda"):
        return CPU
    if isinstance(device, str) and device.startswith("cuda"):
        return CPU
    return device


def _made_on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _moved_to_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to)
    def move(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return to(self, *(_on_cpu(arg) for arg in args), **kwargs)

    return move


def _named_as_cuda(tensor_type: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.type: trainers know CUDA tensors by "torch.cuda.FloatTensor" and convert to that name."""

    @functools.wraps(tensor_type)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            name: str = tensor_type(self)
            return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return tensor_type(self, dtype, *args, **kwargs)

    return type_


def _loaded_on_cpu(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_(*args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("map_location"), (str, torch.device)):
            kwargs["map_location"] = _on_cpu(kwargs["map_location"])
        return load(*args, **kwargs)

    return load_


def _unchanged(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


def install() -> None:
    """Put the answers in place; for a process without CUDA."""
    assert not torch.cuda.is_available()
    __import__("torch._dynamo")  # it looks at torch's functions on import and must see the real ones

    cuda: Any = torch.cuda
    current = Stream()
    for name in NOTHING_TO_DO:
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ALWAYS_ZERO:
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    cuda.memory_stats = lambda *args, **kwargs: collections.defaultdict(int)

    cuda.device_count = lambda: 1
    cuda.current_device = lambda: CPU
    cuda.get_device_properties = lambda *args: _DeviceProperties()
    cuda.get_device_capability = lambda *args: (0, 0)
    cuda.get_device_name = lambda *args: "cpu"
    cuda.device = lambda *args: contextlib.nullcontext()

    cuda.Stream = cuda.ExternalStream = Stream
    cuda.Event = Event
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: current
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False

    cuda.manual_seed = cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.default_generators = _Generators()
    cuda._lazy_call = lambda callback, **kwargs: callback()

    for name in FACTORIES:
        setattr(torch, name, _made_on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    for name in TENSOR_FACTORIES:
        setattr(tensor, name, _made_on_cpu(getattr(tensor, name)))
    tensor.to = _moved_to_cpu(tensor.to)
    tensor.type = _named_as_cuda(tensor.type)
    tensor.cuda = tensor.pin_memory = _unchanged
    tensor.record_stream = lambda self, stream: None
    module: Any = torch.nn.Module
    module.to = _moved_to_cpu(module.to)
    module.cuda = _unchanged
    torch.load = _loaded_on_cpu(torch.load)
