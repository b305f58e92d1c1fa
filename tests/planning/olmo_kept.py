"""Bytes that autograd keeps of one micro-batch of a spec's model in OLMo, on one process in float32.

python olmo_kept.py FOLDER SPEC SET …       in the patched tree; FOLDER is to write to
"""

import sys
from pathlib import Path

import torch

from polycom_ext.integrations.olmo import rehearsal
from polycom_ext.integrations.olmo.adapter import CONFIG, OLMoAdapter
from polycom_ext.runs.spec import load

if __name__ == "__main__":
    rehearsal.enable()
    from olmo.config import TrainConfig
    from olmo.model import OLMo

    folder, spec = Path(sys.argv[1]), load(Path(sys.argv[2]), sys.argv[3:])
    path = folder / CONFIG
    path.write_text(OLMoAdapter().files(spec, folder)[CONFIG])
    config = TrainConfig.load(path, validate_paths=False)
    model = OLMo(config.model)
    model.set_activation_checkpointing(config.activation_checkpointing)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    shape = (config.device_train_microbatch_size, config.model.max_sequence_length)
    tokens = torch.randint(config.model.vocab_size, shape)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(tokens).logits[..., :-1, :].contiguous()
        labels = tokens[..., 1:].contiguous()
        torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    print(sum(size for at, size in storages.items() if at not in weights))
