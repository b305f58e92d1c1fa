"""Folders of Hugging Face as models: ours, those of transformers' classes, and the layouts of the authors'.

What a folder means, its config.json says. A constant that fixes the function and is not there is an error;
what older releases of transformers left out because there was only one way is known here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polycom_ext import activations
from polycom_ext.checkpoints.constants import KINDS, complete, described
from polycom_ext.checkpoints.model import Model, check_layers, shapes
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.huggingface.stock import SHARED, STOCK, Stock, theirs
from polycom_ext.integrations.huggingface.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor

CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
"""Files that go with a model as they are."""
OPTIONAL = ("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
ALONE: dict[str, Any] = {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
"""What a folder of transformers' classes means that is older than the key: there was only this way."""
DENSE: dict[str, Any] = {"num_experts": 0, "num_experts_per_tok": 0, "norm_topk_prob": False}
PLAIN: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "sliding_window": (None,),
    "partial_rotary_factor": (None, 1.0),
}
"""Key -> what it may be: for any other value there is no such model in the exchange format."""
COEFFICIENTS = ("mlp.experts.act_fn.", "mlp.act_fn.", "mlp.activation_func.", "mlp.act.", "act_fn.", "act.")
"""Where a block's coefficients may stand: here, in Megatron, and in OLMo, with their authors and with us."""
BUFFERS = "rotary_emb.inv_freq"
"""What old releases saved, and every release computes."""


def read(folder: Path) -> Model:
    """Open a folder. Raises PolycomError where it is damaged, or its model cannot be expressed."""
    source = str(folder / "config.json")
    said = told(folder / "config.json")
    if "model_type" not in said:
        raise PolycomError(f"{source} does not say model_type, so not what the model is")
    weights = Weights(folder)
    config, own = _configuration(said, weights, source)
    complete(config, source)
    check_layers(config, len(weights.files), source)
    readers, taken = dict[str, Callable[[], Any]](), set[str]()
    for name in shapes(config):
        named = theirs(own, name)
        names = []
        for expert in range(config["num_experts"] if "{expert}" in named else 1):
            names.append(_placed(named.format(expert=expert), weights))
            if names[-1] not in weights.files:
                raise PolycomError(f"{folder} has nothing for {names[-1]}")
        if "{expert}" in named:
            readers[name] = _stack(weights, names)
        else:
            readers[name] = _one(weights, names[0], coefficient=".act_fn." in name)
        taken.update(names)
    if config["tie_word_embeddings"]:
        taken.add("lm_head.weight")
    left = sorted(name for name in weights.files if name not in taken and not name.endswith(BUFFERS))
    if left:
        raise PolycomError(
            f"{folder} holds {left[0]}, which such a model does not have ({len(left)} such tensors)"
        )
    files = {name: folder / name for name in CARRIED if (folder / name).is_file()}
    return Model(config, readers, str(folder), files)


def told(path: Path) -> dict[str, Any]:
    """What a file of settings says. Raises PolycomError where it is none."""
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PolycomError(f"{path} cannot be read: {error}") from None
    if not isinstance(said, dict):
        raise PolycomError(f"{path} cannot be read: it holds no settings by name")
    return said


def _configuration(
    said: Mapping[str, Any], weights: Weights, source: str
) -> tuple[dict[str, Any], Stock | None]:
    """What config.json says, and whose names the tensors have; no stock class where they have ours."""
    for key, allowed in PLAIN.items():
        if said.get(key) not in allowed:
            raise PolycomError(f"{source} says {key} {said[key]!r}, which the exchange format lacks")
    config = {key: said[key] for key in (*KINDS, *OPTIONAL) if key in said}
    config |= _rope(said, source)
    if said["model_type"] == "polycom":
        return config, None
    own = next((one for one in STOCK if one.model_type == said["model_type"]), None)
    if own is None:
        known = ", ".join(["polycom", *(one.model_type for one in STOCK)])
        raise PolycomError(f"{source}: an architecture {said['model_type']!r} cannot be read; {known} can")
    called = {key: own.calls.get(key, key) for key in (*SHARED, *own.keeps)}
    config |= {key: said[name] for key, name in called.items() if name in said}
    config = {**ALONE, **DENSE, **{key: config[key] for key in called if key in config}, **own.needs}
    hidden, heads = (config.get(key) for key in ("hidden_size", "num_attention_heads"))
    if config.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int):
        config["head_dim"] = hidden // max(heads, 1)
    if config.get("num_key_value_heads") is None and heads is not None:
        config["num_key_value_heads"] = heads
    act = said.get("hidden_act")
    for ours, name in own.activations.items():
        if name == act:
            return {**config, "activation": described(ours)}, own
    return {**config, "activation": _of_the_authors(act, weights, source)}, None


def _rope(said: Mapping[str, Any], source: str) -> dict[str, Any]:
    """rope_theta, from where transformers 4 or 5 has it."""
    theta = said.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        rope = said.get(key) or {}
        if not isinstance(rope, dict):
            raise PolycomError(f"{source} says {key} {rope!r}, which makes no sense")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise PolycomError(f"{source} says rope_type {kind!r}, which the exchange format lacks")
        theta = rope.get("rope_theta", theta)
    return {} if theta is None else {"rope_theta": theta}


def _of_the_authors(act: Any, weights: Weights, source: str) -> dict[str, Any]:
    """The activation of a Llama whose `hidden_act` is one of the registry's that learn: no gate.

    config.json has no constants of it, which are those of the authors' code; the tensors tell the order.
    """
    if not isinstance(act, str) or act not in activations.REGISTRY or not activations.find(act).learnable:
        raise PolycomError(f"{source} says hidden_act {act!r}, which no such model can be read with")
    activation = described(act)
    if "order" in activation:
        ends = tuple(f".{place}weight" for place in COEFFICIENTS)
        stored = next((name for name in weights.files if name.endswith(ends)), None)
        if stored is None:
            raise PolycomError(
                f"{weights.folder} holds no coefficients of {act}, in any layout that is known"
            )
        activation["order"] = weights.read(stored).numel()
    return activation


def _placed(name: str, weights: Weights) -> str:
    """Where a tensor lies that is not an expert's alone; coefficients, in whichever layout there is."""
    for place in COEFFICIENTS[:2]:
        block, found, parameter = name.partition(place)
        if found:
            places = (f"{block}{other}{parameter}" for other in COEFFICIENTS)
            return next((one for one in places if one in weights.files), name)
    return name


def _one(weights: Weights, name: str, coefficient: bool) -> Callable[[], Tensor]:
    def read_one() -> Tensor:
        tensor = weights.read(name)
        return tensor.float() if coefficient and tensor.itemsize < 4 else tensor

    return read_one


def _stack(weights: Weights, names: Sequence[str]) -> Callable[[], Tensor]:
    def read_all() -> Tensor:
        import torch

        return torch.stack([weights.read(name) for name in names])

    return read_all
