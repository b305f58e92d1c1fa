"""Loads a folder of Hugging Face by Megatron-Bridge, prints logits as JSON, and compares what it exports.

bridged.py PACKAGE FOLDER TOKENS-AS-JSON MEGATRON-OPTIONS

PACKAGE is where megatron-bridge's wheel is unpacked. The `__init__` of its packages import every model that
it knows, and with them packages that need a GPU: its modules are taken without these.
"""

import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file


def find(package: str) -> None:
    import megatron

    megatron.__path__ = [*megatron.__path__, f"{package}/megatron"]
    for name in ("bridge", "bridge.models", "bridge.models.conversion", "bridge.models.hf_pretrained"):
        module = types.ModuleType(f"megatron.{name}")
        module.__path__ = [f"{package}/megatron/{name.replace('.', '/')}"]
        sys.modules[module.__name__] = module


def main() -> None:
    package, folder, tokens, *options = sys.argv[1:]
    sys.argv = ["bridged", *options]
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training.initialize import initialize_megatron

    from polycom_ext.integrations.megatron import pretrain

    initialize_megatron(extra_args_provider=pretrain._add_options, allow_no_cuda=True)
    find(package)
    from megatron.bridge.models.conversion.model_bridge import get_model_bridge
    from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM

    from polycom_ext.errors import PolycomError
    from polycom_ext.integrations import huggingface
    from polycom_ext.integrations.megatron import bridge as ours

    huggingface.register()
    hf = PreTrainedCausalLM.from_pretrained(folder)
    bridge = get_model_bridge("PolyComForCausalLM")
    assert type(bridge) is ours.PolyComBridge
    try:
        provider = bridge.provider_bridge(hf)
    except PolycomError as refusal:
        print(json.dumps(str(refusal)))
        return
    provider.transformer_layer_spec = get_gpt_layer_local_spec(
        normalization=provider.normalization, qk_layernorm=provider.qk_layernorm
    )
    provider.use_cpu_initialization = True
    for fusion in ("gradient_accumulation", "masked_softmax", "bias_dropout", "bias_activation"):
        setattr(provider, f"{fusion}_fusion", False)
    provider.apply_rope_fusion = provider.persist_layer_norm = False
    provider.finalize()
    model = provider.provide(pre_process=True, post_process=True)
    bridge.load_weights_hf_to_megatron(hf, [model])
    expected = {
        name: one for file in Path(folder).glob("*.safetensors") for name, one in load_file(file).items()
    }
    exported = dict(bridge.stream_weights_megatron_to_hf([model], hf, show_progress=False))
    assert exported.keys() == expected.keys(), exported.keys() ^ expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    ids = torch.tensor(json.loads(tokens))
    places = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        print(json.dumps(model.eval()(ids, places, None).tolist()))


main()
