"""Train with OLMo's own Trainer.

    torchrun --nproc-per-node N -m polycom_ext.integrations.olmo.train [CONFIG.yaml] [--KEY=VALUE …]

ai2-olmo's wheel holds the trainer but no script to call it; this is that script, and it serves the MoE branch
as well. CONFIG and the keys are upstream's TrainConfig, as in `--model.d_model=64`; ours are
`--polycom-metrics=FILE` and `--polycom-coefficients=FILE`. Upstream's own scripts/train.py works with the
patched tree too, since the block builds the activation.

OLMo is imported in `main`: on a CPU the rehearsal comes first.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from polycom_ext import rehearsal
from polycom_ext.errors import PolycomError

ERROR_MARK = "polycom: error: "
"""Begins the one line that says why a run was refused; the launcher looks for it in the log."""
OURS = ("--polycom-metrics", "--polycom-coefficients")


def _split_arguments(arguments: list[str]) -> tuple[Path | None, list[str], dict[str, Path | None]]:
    """The configuration file, upstream's overrides, and our own options."""
    config = Path(arguments[0]) if arguments and not arguments[0].startswith("--") else None
    ours: dict[str, Path | None] = dict.fromkeys(OURS)
    overrides = []
    for argument in arguments[config is not None :]:
        name, equals, value = argument.partition("=")
        if name in OURS and value:
            ours[name] = Path(value)
        elif name.startswith("--") and equals:
            overrides.append(argument)
        else:
            raise PolycomError(f"{argument!r} must have the form --KEY=VALUE")
    return config, overrides, ours


def main() -> None:
    """Train; exit status 2 with one sentence when the configuration cannot be right."""
    # What OLMo saves of its trainer is more than tensors; torch reads such files only when told to.
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    try:
        config, overrides, ours = _split_arguments(sys.argv[1:])
        rehearsal.enable("olmo")
        from polycom_ext.integrations.olmo import loop

        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend=backend, timeout=timedelta(minutes=30))
        run = loop.prepare(loop.load_config(config, overrides), device)
    except PolycomError as error:
        print(f"{ERROR_MARK}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    loop.train(run, ours["--polycom-metrics"], ours["--polycom-coefficients"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
