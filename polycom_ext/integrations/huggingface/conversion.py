"""Models as folders of Hugging Face: config.json, shards of safetensors, the code that transformers lacks.

A model that one of transformers' own classes computes is written for that class, and needs no code of ours.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polycom_ext.checkpoints.forms import Options
from polycom_ext.checkpoints.model import Model

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).parent
CODE = ("activation_polycom.py", "configuration_polycom.py", "modeling_polycom.py")
INDEX = "model.safetensors.index.json"
SILU_GATED = {"name": "swiglu", "gated": True}
RMS = {"kind": "rms", "affine": True, "bias": False}
BARE = {"kind": "layer", "affine": False, "bias": False}
"""The norm of OLMo's dense models, whose eps is not to be chosen."""
SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *(
        "num_key_value_heads",
        "max_position_embeddings",
        "tie_word_embeddings",
        "attention_bias",
        "rope_theta",
    ),
    *("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Keys that mean the same in each of transformers' classes."""


@dataclass(frozen=True)
class Stock:
    """A class of transformers that computes some of our models."""

    model_type: str
    architecture: str
    needs: Mapping[str, Any]
    """What our configuration must say."""
    keeps: tuple[str, ...]
    """Keys besides SHARED that it takes as they are."""
    renames: tuple[tuple[str, str], ...] = ()
    """Pattern of our name -> its name; a stack of experts is taken apart at `{expert}`."""


_EXPERTS = r"mlp\.experts\.(gate|up|down)_proj$"
STOCK = (
    Stock(
        *("llama", "LlamaForCausalLM"),
        needs={"norm": RMS, "qk_norm": None, "clip_qkv": None, "num_experts": 0},
        keeps=("head_dim", "mlp_bias", "rms_norm_eps"),
    ),
    Stock(
        *("olmo", "OlmoForCausalLM"),
        needs={"norm": BARE, "rms_norm_eps": 1e-5, "qk_norm": None, "num_experts": 0, "mlp_bias": False},
        keeps=("clip_qkv",),
    ),
    Stock(
        *("olmoe", "OlmoeForCausalLM"),
        needs={"norm": RMS, "qk_norm": "row", "mlp_bias": False},
        keeps=("rms_norm_eps", "clip_qkv", "num_experts", "num_experts_per_tok", "norm_topk_prob"),
        renames=(
            (r"self_attn\.([qk])_proj\.norm\.", r"self_attn.\1_norm."),
            (_EXPERTS, r"mlp.experts.{expert}.\1_proj.weight"),
        ),
    ),
    Stock(
        *("mixtral", "MixtralForCausalLM"),
        needs={
            "norm": RMS,
            "qk_norm": None,
            "clip_qkv": None,
            "norm_topk_prob": True,
            "attention_bias": False,
        },
        keeps=("head_dim", "rms_norm_eps", "num_experts_per_tok"),
        renames=(
            (r"mlp\.gate\.weight$", "block_sparse_moe.gate.weight"),
            (r"mlp\.experts\.gate_proj$", "block_sparse_moe.experts.{expert}.w1.weight"),
            (r"mlp\.experts\.up_proj$", "block_sparse_moe.experts.{expert}.w3.weight"),
            (r"mlp\.experts\.down_proj$", "block_sparse_moe.experts.{expert}.w2.weight"),
        ),
    ),
)


def stock(config: Mapping[str, Any]) -> Stock | None:
    """The class of transformers that computes this model, if there is one."""
    if dict(config["activation"]) != SILU_GATED:
        return None
    for one in STOCK:
        if all(config[key] == value for key, value in one.needs.items()):
            return one
    return None


def configuration(model: Model, dtype: str) -> dict[str, Any]:
    """What config.json says of it."""
    own = stock(model.config)
    if own is None:
        auto = {
            "AutoConfig": "configuration_polycom.PolyComConfig",
            "AutoModel": "modeling_polycom.PolyComModel",
        }
        auto["AutoModelForCausalLM"] = "modeling_polycom.PolyComForCausalLM"
        named = {"model_type": "polycom", "architectures": ["PolyComForCausalLM"], "auto_map": auto}
        kept = {**model.config, "hidden_act": model.config["activation"]["name"]}
    else:
        named = {"model_type": own.model_type, "architectures": [own.architecture]}
        keys = [key for key in (*SHARED, *own.keeps) if key in model.config]
        kept = {**{key: model.config[key] for key in keys}, "hidden_act": "silu"}
        if own.model_type == "mixtral":
            kept |= {"num_local_experts": model.config["num_experts"], "sliding_window": None}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {
        **named,
        **ids,
        **kept,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def tensors(model: Model) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The names in the folder and how to read each; a stack of experts to be taken apart is read once."""
    own = stock(model.config)
    for name, read in model.tensors.items():
        new = name
        for pattern, by in own.renames if own else ():
            new = re.sub(pattern, by, new)
        if "{expert}" not in new:
            yield new, read
            continue
        stack = read()
        for expert in range(model.config["num_experts"]):
            yield new.format(expert=expert), lambda expert=expert, stack=stack: stack[expert].contiguous()  # type: ignore[misc]


class Folders:
    """Writes them."""

    def write(self, model: Model, folder: Path, options: Options, advance: Callable[[int], object]) -> None:
        _write(model, folder, options, advance)


CHECKPOINTS = Folders()


def _write(model: Model, folder: Path, options: Options, advance: Callable[[int], object]) -> None:
    """Write the model into a folder that exists; no more than a shard is in memory.

    An activation's coefficients keep their type, float32.
    """
    import torch
    from safetensors.torch import save_file

    shard: dict[str, Tensor] = {}
    size, total, files, kind = 0, 0, list[tuple[Path, list[str]]](), None

    def end_shard() -> None:
        nonlocal shard, size
        path = folder / f"model-{len(files) + 1:05d}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        files.append((path, list(shard)))
        shard, size = {}, 0

    for name, read in tensors(model):
        tensor = read()
        if options.dtype is not None and ".act_fn." not in name:
            tensor = tensor.to(getattr(torch, options.dtype))
        kind = kind or tensor.dtype
        if shard and size + tensor.nbytes > options.shard_bytes:
            end_shard()
        shard[name] = tensor.contiguous().clone() if tensor._base is not None else tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
        advance(tensor.nbytes)
    end_shard()
    where = {}
    for number, (path, names) in enumerate(files, start=1):
        final = (
            f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        )
        path.rename(folder / final)
        where.update(dict.fromkeys(names, final))
    if len(files) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    config = configuration(model, str(kind).removeprefix("torch."))
    _write_json(folder / "config.json", config)
    generation = {
        key: config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config[key] is not None
    }
    _write_json(folder / "generation_config.json", generation)
    if options.tokenizer is not None:
        _write_tokenizer(folder, options.tokenizer, config)
    if config["model_type"] == "polycom":
        for name in CODE:
            shutil.copyfile(HERE / name, folder / name)


def _write_tokenizer(folder: Path, tokenizer: Path, config: Mapping[str, Any]) -> None:
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    words = {
        word: int(number) for word, number in json.loads(tokenizer.read_text())["model"]["vocab"].items()
    }
    named = {number: word for word, number in words.items()}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
    }
    for token in ("bos", "eos", "pad"):
        if config.get(f"{token}_token_id") in named:
            settings[f"{token}_token"] = named[config[f"{token}_token_id"]]
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
