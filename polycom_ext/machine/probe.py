"""Imports what is heavy or may crash, in a process of its own, and says what it found.

    python -m polycom_ext.machine.probe torch | MODULE

Each thing found is a line of JSON: those before a crash are told. `ask` starts such a process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module, metadata, util
from typing import Any

SECONDS = 180
"""A first import from a busy network file system takes a minute."""
MOST_OFF = 1e-4
"""Ratio of norms in float32; what is wrong is wrong by more."""


def ask(what: str) -> tuple[dict[str, Any], str]:
    """What a process found out, and why it did not come to its end, in words; nothing if it did."""
    command = [sys.executable, "-m", __name__, what]
    try:
        told = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {}, f"its import has not ended in {SECONDS} s"
    found: dict[str, Any] = {}
    for line in told.stdout.splitlines():
        found |= json.loads(line)
    return found, "" if told.returncode == 0 else _how_it_ended(told.returncode, told.stderr)


def _how_it_ended(status: int, stderr: str) -> str:
    if status < 0:
        return f"its import crashes ({signal.Signals(-status).name})"
    return (stderr.strip().splitlines() or [f"its import ends with status {status}"])[-1]


def _torch(tell: Callable[[dict[str, Any]], None]) -> None:
    import torch

    tell({"version": torch.__version__, "cuda": torch.version.cuda, "path": str(torch.__path__[0])})
    if torch.version.cuda is not None:
        tell(_devices(torch))
    from polycom_ext.ops.polynomial import library

    gpus = range(torch.cuda.device_count()) if "cuda" in library.devices else ()
    tell(
        {
            "fused_on": sorted(library.devices),
            "fused_problem": library.problem,
            "instruction_set": library.instruction_set(),
            "architectures": library.cuda_architectures(),
            "gpu_problems": [library.gpu_problem(index) for index in gpus],
        }
    )
    served = [f"cuda:{index}" for index in gpus if not library.gpu_problem(index)]
    tell({"checked": {device: _checked(torch.device(device)) for device in ("cpu", *served)}})


def _devices(torch: Any) -> dict[str, Any]:
    """The GPUs as torch numbers them, or why it has none."""
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    about: dict[str, Any] = {"nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None}
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return {**about, "cuda_problem": str(error).splitlines()[0]}
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    devices = [
        {
            "name": one.name,
            "capability": f"{one.major}.{one.minor}",
            "uuid": f"GPU-{getattr(one, 'uuid', '')}",
            "memory": one.total_memory,
        }
        for one in found
    ]
    return {**about, "devices": devices}


def _checked(device: Any) -> dict[str, str]:
    """Activation -> `fused`, `plain`, or what differs from its definition in float64, forward or backward.

    Of those that learn: a formula of reference.py has the activation's name, and takes x and the parameters.
    """
    from polycom_ext import activations, reference

    formulas = {name.replace("_", ""): one for name, one in vars(reference).items() if callable(one)}
    learnable = [name for name, entry in activations.REGISTRY.items() if entry.learnable and name in formulas]
    return {name: _compared(activations.build(name, device=device), formulas[name]) for name in learnable}


def _compared(module: Any, formula: Callable[..., Any]) -> str:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        fused = False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.fused |= func.namespace == "polycom"
            return func(*args, **(kwargs or {}))

    parameters = dict(module.named_parameters())
    device = next(iter(parameters.values())).device
    x = torch.linspace(-3, 3, 8 * 96, device=device).reshape(8, 96).requires_grad_()
    with Watch() as watch:
        y = module(x)
    wanted = formula(x, *parameters.values())
    results = {"y": (y, wanted)}
    gradients = (torch.autograd.grad(one.square().sum(), [x, *parameters.values()]) for one in (y, wanted))
    for name, *pair in zip(["x", *parameters], *gradients, strict=True):
        results[f"the gradient of {name}"] = (pair[0], pair[1])
    for name, (got, right) in results.items():
        right = right.detach().double()
        error = float((got.detach().double() - right).norm() / right.norm().clamp(min=1e-30))
        if not error < MOST_OFF:
            return f"{name} is off by {error:.1e}"
    return "fused" if watch.fused else "plain"


def _module(name: str, tell: Callable[[dict[str, Any]], None]) -> None:
    """Version, and for Transformer Engine which of the doors for operations of others it has."""
    spec = util.find_spec(name.partition(".")[0])
    if spec is None:
        return
    folders = list(spec.submodule_search_locations or ())
    names = metadata.packages_distributions().get(spec.name, [])
    version = next((metadata.version(one) for one in names), None)
    tell({"path": folders[0] if folders else spec.origin or "", "version": version})
    if name == "apex" and not any(os.path.isdir(os.path.join(one, "multi_tensor_apply")) for one in folders):
        summary = next((metadata.metadata(one)["Summary"] for one in names), None)
        tell({"foreign": summary or "it has no multi_tensor_apply"})
        return
    import_module("torch")  # whose libraries theirs are linked with
    module = import_module(name)
    tell({"imported": True})
    if name == "transformer_engine.pytorch":
        doors = ("register_forward_fusion", "register_backward_fusion", "register_forward_backward_fusion")
        ops = getattr(module, "ops", None)
        tell({"features": [door for door in doors if hasattr(ops, door)]})


def main() -> None:
    """What others print on standard output goes to standard error."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def tell(found: dict[str, Any]) -> None:
            print(json.dumps(found), file=out, flush=True)

        what = sys.argv[1]
        if what == "torch":
            _torch(tell)
        else:
            _module(what, tell)


if __name__ == "__main__":
    main()
