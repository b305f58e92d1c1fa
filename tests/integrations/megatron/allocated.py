"""Train a few steps as the arguments say, and write what each rank holds: FOLDER/RANK.json.

    allocated.py FOLDER MEGATRON-OPTIONS

Storages are counted once, whatever views there are of them: of parameters, of gradients, of the optimizer's
state, and of what autograd keeps for backward, which is looked at where backward begins: what an
output-discarding checkpoint has dropped by then does not count. The most of all backward passes is written,
and what upstream itself reckons.
"""

import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.training import get_args, training
from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

from polycom_ext.integrations.megatron import pretrain

Storages = dict[int, int]
"""Where -> bytes."""


class Kept:
    """A tensor that autograd keeps, alive for as long as autograd needs it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def storages(tensors: list[torch.Tensor]) -> Storages:
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def resident(model: list[Any], optimizer: Any) -> dict[str, int]:
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    weights = storages(parameters)
    grads = [getattr(parameter, "main_grad", parameter.grad) for parameter in parameters]
    gradients = storages([grad for grad in grads if grad is not None])
    state: Storages = {}
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = one.optimizer
        held = [p for group in inner.param_groups for p in group["params"]]
        held += [
            value for values in inner.state.values() for value in values.values() if torch.is_tensor(value)
        ]
        state |= storages(held)
    state = {at: size for at, size in state.items() if at not in weights | gradients}
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(state.values()),
    }


def main() -> None:
    folder = Path(sys.argv.pop(1))
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()
    found: dict[str, Any] = {"activations": 0}
    weights: Storages = {}

    def pack(tensor: torch.Tensor) -> Kept:
        kept = Kept(tensor.detach() if tensor.requires_grad and tensor.is_leaf else tensor)
        alive.add(kept)
        return kept

    def look() -> None:
        saved = storages([kept.tensor for kept in alive])
        saved = {at: size for at, size in saved.items() if at not in weights}
        found["activations"] = max(found["activations"], sum(saved.values()))

    train_step, backward_step = training.train_step, schedules.backward_step

    def looking(*args: Any, **kwargs: Any) -> Any:
        look()
        return backward_step(*args, **kwargs)

    def measured(forward: Any, data: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        weights.update(storages([parameter for chunk in model for parameter in chunk.parameters()]))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            done = train_step(forward, data, model, optimizer, *args, **kwargs)
        found.update(resident(model, optimizer))
        return done

    training.train_step, schedules.backward_step = measured, looking
    pretrain.main()
    args = get_args()
    found["upstream's weights, gradients, optimizer"] = compute_weight_and_optimizer_memory(args)
    found["upstream's FLOPs a token"] = training.num_floating_point_operations(args, 1) / args.seq_length
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


main()
