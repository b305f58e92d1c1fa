"""Build the models of specs as Megatron does, on tensors without memory; name -> [all, active] parameters.

    python megatron_parameters.py SPEC …       in the patched tree

How the work is divided and what computes it change no parameter: that part of the spec is a CPU's.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from torch._subclasses.fake_tensor import FakeTensorMode

from polycom_ext.integrations.megatron import miniature, rehearsal
from polycom_ext.integrations.megatron.adapter import MegatronAdapter
from polycom_ext.integrations.megatron.pretrain import _add_options
from polycom_ext.runs import rehearse
from polycom_ext.runs.spec import Spec, load_each


def arguments(spec: Spec) -> list[str]:
    """What Megatron is given for one process of a CPU."""
    of_a_cpu = {
        name.removeprefix("megatron."): value
        for name, value in rehearse.on_a_cpu(spec.trainer).items()
        if name.startswith("megatron.")
    }
    options = {name: value for name, value in spec.options.items() if not name.startswith(miniature.OF_GPUS)}
    options |= {**of_a_cpu, "expert-model-parallel-size": 1, "use-cpu-initialization": True}
    del options["use-distributed-optimizer"]
    alone = replace(spec, nodes=1, processes_per_node=1, options=options)
    return MegatronAdapter().arguments(alone, Path("nowhere"))[1:]


if __name__ == "__main__":
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {**rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    rehearsal.enable()
    from megatron.training import arguments as upstream
    from megatron.training import get_args, global_vars, initialize

    from polycom_ext.integrations.megatron import gpt

    counts: dict[str, tuple[int, int]] = {}
    for spec in (spec for path in sys.argv[1:] for spec in load_each(Path(path))):
        if spec.name in counts:  # a run of two figures
            continue
        sys.argv = arguments(spec)
        if not counts:
            initialize.initialize_megatron(extra_args_provider=_add_options, allow_no_cuda=True)
        else:
            global_vars._GLOBAL_ARGS = upstream.validate_args(upstream.parse_args(_add_options))
            global_vars._GLOBAL_ARGS.padded_vocab_size = spec.options["vocab-size"] + 1
        with FakeTensorMode():
            model = gpt.build_model()
        experts = get_args().num_experts or 1
        chosen = get_args().moe_router_topk if experts > 1 else 1
        everything, active = 0, 0
        for name, parameter in model.named_parameters():
            everything += parameter.numel()
            of_experts = ".local_experts." in name and ".activation_func." not in name
            active += parameter.numel() * chosen // experts if of_experts else parameter.numel()
        counts[spec.name] = (everything, active)
        assert get_args().padded_vocab_size == spec.options["vocab-size"] + 1
    print(json.dumps(counts))
