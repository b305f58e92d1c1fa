"""Megatron-LM 0.17.1 on a CPU: the few places where torch's names are not enough, and nothing else.

    torchrun --nproc-per-node N -m polycom_ext.integrations.megatron.rehearsal pretrain_gpt.py OPTIONS

runs a script of Megatron's own under it, in the checkout that the script is in; where CUDA is available, as
if the script had been named alone.

Each function below mends one upstream place and says which. The last three are faults of the distributed
optimizer that show only with torch's AdamW, that is, without Transformer Engine and Apex.

A CUDA stream finishes what was begun, though its handle was dropped, before the memory that it reads is used
anew; gloo promises neither. `_sends_are_finished` gives sends that guarantee: upstream waits for everything
else that it begins before it uses what comes of it.
"""

from __future__ import annotations

import copy
import functools
import os
import runpy
import sys
from importlib import import_module
from typing import Any, cast

import torch

from polycom_ext.integrations.megatron import data_helpers, torch_cuda


def enable() -> None:
    """Stand in for torch.cuda, then mend Megatron, which is imported; nothing where CUDA is available."""
    if torch.cuda.is_available():
        return
    torch_cuda.install()
    _allow_no_cuda()
    data_helpers.enable()
    _no_kernels_to_warm_up()
    _split_sizes_as_numpy()
    _norm_under_sequence_parallelism()
    _parts_of_unequal_size()
    _sends_are_finished()
    _discarded_outputs_come_back()
    _writers_copy()
    optimizer = import_module("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer
    _materialise_adam_state(optimizer)
    _step_is_not_a_saved_tensor(optimizer)
    _one_step_counter_each(optimizer)


def _allow_no_cuda() -> None:
    """training/initialize.py asserts CUDA unless told not to."""
    training: Any = import_module("megatron.training.training")
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)


def _no_kernels_to_warm_up() -> None:
    """training/initialize.py warms up CUDA fusions with random numbers, more of them for a wider FFN."""
    training: Any = import_module("megatron.training.training")
    training.set_jit_fusion_options = lambda: None


def _split_sizes_as_numpy() -> None:
    """moe/token_dispatcher.py makes its split sizes numpy arrays only on their way from a CUDA tensor."""

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher: Any = import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = to_cpu


def _norm_under_sequence_parallelism() -> None:
    """transformer/torch_norm.py refuses sequence parallelism: it lacks but the mark that sums gradients."""
    norm = import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    make = norm.__new__

    def new(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> torch.nn.Module:
        without = copy.copy(config)
        without.sequence_parallel = False
        module: torch.nn.Module = make(cls, without, hidden_size, eps, **kwargs)
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return module

    norm.__new__ = new


def _parts_of_unequal_size() -> None:
    """tensor_parallel/mappings.py gathers and scatters unequal parts; gloo takes equal ones only.

    It does so for experts under expert and expert tensor parallelism: as many tokens as each rank has.
    """
    mappings: Any = import_module("megatron.core.tensor_parallel.mappings")
    gather_equal, scatter_equal = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(x: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or len(set(sizes)) == 1:
            return gather_equal(x, group, sizes, use_global_buffer)
        parts = [x.new_empty(int(size), *x.shape[1:]) for size in sizes]
        parts[group.rank()] = x.contiguous()
        for rank, part in enumerate(parts):
            torch.distributed.broadcast(part, group=group, group_src=rank)
        return torch.cat(parts)

    def scatter(x: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or len(set(sizes)) == 1:
            return scatter_equal(x, group, sizes, use_global_buffer)
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split([int(size) for size in sizes])[group.rank()].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, scatter


class _Send:
    """A send under way, which may be waited for more than once."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, *args: Any) -> bool:
        return bool(self._work.is_completed() or self._work.wait(*args))

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())


def _sends_are_finished() -> None:
    """pipeline_parallel/schedules.py frees an output whose send is under way, and forgets the last ones.

    So a send reads from an alias, which keeps the memory, and is kept until it was waited for, by upstream
    or in `torch.cuda.synchronize`.
    """
    c10d: Any = torch.distributed.distributed_c10d
    begin = c10d.isend
    under_way: list[_Send] = []

    @functools.wraps(begin)
    def isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> _Send | None:
        work = begin(tensor.detach(), *args, **kwargs)
        if work is None:  # this rank is not in the group
            return None
        under_way[:] = [send for send in under_way if not send.is_completed()]
        under_way.append(_Send(work))
        return under_way[-1]

    def synchronize(device: Any = None) -> None:
        while under_way:
            under_way.pop().wait()

    cast(Any, torch.distributed).isend = c10d.isend = isend
    torch.cuda.synchronize = synchronize


def _discarded_outputs_come_back() -> None:
    """tensor_parallel/random.py compiles, in the first backward pass, what gives a tensor another's memory.

    A copy serves as well, and needs no compiler.
    """

    def share_storage(discarded: torch.Tensor, recomputed: torch.Tensor) -> None:
        memory = discarded.untyped_storage()
        memory.resize_(recomputed.untyped_storage().nbytes())
        memory.copy_(recomputed.untyped_storage())

    random: Any = import_module("megatron.core.tensor_parallel.random")
    random._get_share_storage = lambda: share_storage


def _writers_copy() -> None:
    """dist_checkpointing's process for --async-save knows nothing of the rehearsal, and never answers."""
    utils = import_module("megatron.core.dist_checkpointing.strategies.async_utils")
    utils.PersistentAsyncCaller.async_loop = staticmethod(_write_checkpoints)


def _write_checkpoints(*args: Any) -> None:
    """That process: training goes on in the very memory that it was sent, so it takes a copy first.

    From a GPU `Tensor.to("cpu")` makes one.
    """
    torch_cuda.install()
    strategies = "megatron.core.dist_checkpointing.strategies"
    writer = import_module(f"{strategies}.filesystem_async").FileSystemWriterAsync
    preload = writer.preload_tensors

    def copy_tensors(*buckets: Any) -> list[Any]:
        return [
            (file, key, (objects, [(item, tensor.clone()) for item, tensor in tensors]))
            for file, key, (objects, tensors) in preload(*buckets)
        ]

    writer.preload_tensors = staticmethod(copy_tensors)
    import_module(f"{strategies}.async_utils").PersistentAsyncCaller.async_loop(*args)


def _materialise_adam_state(optimizer: Any) -> None:
    """distrib_optimizer.py:647 reads AdamW's state before its first step, when there is none yet."""
    state_dict = optimizer.state_dict

    def with_state(self: Any) -> Any:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                state.setdefault("step", torch.tensor(0.0))
                for name in ("exp_avg", "exp_avg_sq"):
                    if name not in state:
                        state[name] = torch.zeros_like(parameter.data)
        return state_dict(self)

    optimizer.state_dict = with_state


def _step_is_not_a_saved_tensor(optimizer: Any) -> None:
    """distrib_optimizer.py:955 looks for all of AdamW's state among saved tensors; `step` is not there."""
    set_states = optimizer._set_main_param_and_optimizer_states

    def with_step(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> Any:
        return set_states(self, model_param, {**tensors, "step": None})

    optimizer._set_main_param_and_optimizer_states = with_step


def _one_step_counter_each(optimizer: Any) -> None:
    """distrib_optimizer.py:832 gives all parameters one `step` tensor, which AdamW advances once for each."""
    load_state_dict = optimizer.load_state_dict

    def with_own_counters(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    optimizer.load_state_dict = with_own_counters


def _main() -> None:
    if not os.path.isfile("".join(sys.argv[1:2])):
        print(
            "polycom: name a script of Megatron's, such as pretrain_gpt.py, and its options", file=sys.stderr
        )
        sys.exit(2)
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # where Python looks when it runs the script
    enable()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _main()
