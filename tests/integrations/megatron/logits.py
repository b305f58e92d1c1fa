"""Prints the logits of a checkpoint by Megatron's own model, one sequence after the other, as JSON.

logits.py CHECKPOINTS TOKENS-AS-JSON MEGATRON-OPTIONS
"""

import json
import sys

import torch


def main() -> None:
    folder, tokens, *options = sys.argv[1:]
    sys.argv = ["logits", *options, "--load", folder, "--finetune", "--no-load-optim", "--no-load-rng"]
    sys.argv += ["--dist-ckpt-strictness", "assume_ok_unexpected"]
    from megatron.core.enums import ModelType
    from megatron.training import get_model
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    from polycom_ext.integrations.megatron import gpt, pretrain

    initialize_megatron(extra_args_provider=pretrain._add_options, allow_no_cuda=True)
    (model,) = get_model(gpt.build_model, ModelType.encoder_or_decoder, wrap_with_ddp=False)
    load_checkpoint([model], None, None)
    ids = torch.tensor(json.loads(tokens))
    places = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        print(json.dumps(model.eval()(ids, places, None).tolist()))


main()
