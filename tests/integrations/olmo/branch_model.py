"""Run on the MoE branch: models with megablocks' experts, and what 0.6.0 must agree with.

    python branch_model.py OUTPUT RELEASED_CONFIG CASE …

A case is a JSON object of ModelConfig's fields; OUTPUT gets, by case, the state dict, the logits, both router
losses and the gradients of all parameters for a fixed batch.
"""

import json
import sys
from typing import Any

import torch

from polycom_ext.integrations.olmo import rehearsal

if __name__ == "__main__":
    rehearsal.enable()
    from megablocks.layers import moe
    from olmo.config import ModelConfig, TrainConfig, config_to_moe_args
    from olmo.model import OLMo

    released = TrainConfig.load(sys.argv[2], validate_paths=False).model
    shapes = {name: tuple(t.shape) for name, t in OLMo(released).state_dict().items()}
    results: dict[str, dict[str, Any]] = {"released": shapes}
    for case in sys.argv[3:]:
        config = ModelConfig(**json.loads(case))
        torch.manual_seed(5)
        model = OLMo(config)
        for name, parameter in model.named_parameters():
            if ".act." in name:
                torch.nn.init.normal_(parameter)
        if config.moe_num_experts > 4:  # so that some experts get no token
            with torch.no_grad():
                for block in model.transformer.blocks:
                    block.ffn.router.layer.weight[5:] = 0
        tokens = torch.randint(config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
        moe.clear_load_balancing_loss()
        logits = model(tokens).logits
        load_balancing, z = moe.batched_load_balancing_loss(config_to_moe_args(config))
        (logits.square().mean() + load_balancing + z).backward()
        results[case] = {
            "state": model.state_dict(),
            "tokens": tokens,
            "logits": logits.detach(),
            "load_balancing": load_balancing.detach(),
            "z": z.detach(),
            "tokens_per_expert": torch.stack([state[0] for state in moe.get_load_balancing_loss()]),
            "grads": {name: p.grad for name, p in model.named_parameters()},
        }
    torch.save(results, sys.argv[1])
