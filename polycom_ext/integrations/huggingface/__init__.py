"""Hugging Face: PolyCom models as transformers' own, by `AutoModelForCausalLM`.

The three files ..._polycom.py are saved into the folder of a model, and work there without this package.
"""

from __future__ import annotations


def register() -> None:
    """Let transformers' Auto classes know PolyCom models, and save the code with them; once is enough."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from polycom_ext.integrations.huggingface.configuration_polycom import PolyComConfig
    from polycom_ext.integrations.huggingface.modeling_polycom import PolyComForCausalLM, PolyComModel

    AutoConfig.register(PolyComConfig.model_type, PolyComConfig, exist_ok=True)
    AutoModel.register(PolyComConfig, PolyComModel, exist_ok=True)
    AutoModelForCausalLM.register(PolyComConfig, PolyComForCausalLM, exist_ok=True)
    PolyComConfig.register_for_auto_class()
    PolyComModel.register_for_auto_class("AutoModel")
    PolyComForCausalLM.register_for_auto_class("AutoModelForCausalLM")
