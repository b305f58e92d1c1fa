"""Build the models of specs as the MoE branch of OLMo does, without memory; name -> [all, active] parameters.

python olmo_parameters.py FOLDER SPEC …       in the patched tree; FOLDER is to write to
"""

import json
import sys
from pathlib import Path

from polycom_ext.integrations.olmo import rehearsal
from polycom_ext.integrations.olmo.adapter import CONFIG, OLMoAdapter
from polycom_ext.runs.spec import load_each

if __name__ == "__main__":
    rehearsal.enable()
    from olmo.config import TrainConfig
    from olmo.model import OLMo

    folder, counts = Path(sys.argv[1]), {}
    for spec in (spec for path in sys.argv[2:] for spec in load_each(Path(path))):
        path = folder / CONFIG
        path.write_text(OLMoAdapter().files(spec, folder)[CONFIG])
        config = TrainConfig.load(path, validate_paths=False).model
        assert config.init_device == "meta"
        everything, active = 0, 0
        for name, parameter in OLMo(config, init_params=False).named_parameters():
            everything += parameter.numel()
            of_experts = ".experts." in name and ".act." not in name
            share = config.moe_top_k / config.moe_num_experts if of_experts else 1
            active += int(parameter.numel() * share)
        counts[spec.name] = (everything, active)
    print(json.dumps(counts))
