"""Run on an OLMo that nobody patched: what its own loaders make of checkpoints, and a checkpoint of its own.

    python upstream_logits.py TOKENS OUTPUT CONFIG SAVED FOLDER …

FOLDERs are OLMo's checkpoints, or hf_olmo's. OUTPUT gets their logits by folder, and `saved`, those of a
model of CONFIG, JSON of ModelConfig's fields, that is saved in SAVED.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from olmo.config import ModelConfig, TrainConfig
from olmo.model import OLMo


def loaded(folder: Path) -> Any:
    if (folder / "config.json").exists():
        from hf_olmo import OLMoForCausalLM

        return OLMoForCausalLM.from_pretrained(folder).eval()
    return OLMo.from_checkpoint(folder)


if __name__ == "__main__":
    tokens = torch.load(sys.argv[1])
    torch.manual_seed(1)
    config, saved = ModelConfig(**json.loads(sys.argv[3])), Path(sys.argv[4])
    saved.mkdir()
    model = OLMo(config)
    torch.save(model.state_dict(), saved / "model.pt")
    TrainConfig(model=config).save(saved / "config.yaml")
    with torch.no_grad():
        results = {folder: loaded(Path(folder))(tokens).logits for folder in sys.argv[5:]}
        results["saved"] = model.eval()(tokens).logits
    torch.save(results, sys.argv[2])
