"""Models as folders of Hugging Face: config.json, shards of safetensors, the code that transformers lacks.

A model that one of transformers' own classes computes is written for that class, and needs no code of ours.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polycom_ext.checkpoints.forms import Found, Options
from polycom_ext.checkpoints.model import Model
from polycom_ext.integrations.huggingface import reading
from polycom_ext.integrations.huggingface.stock import SHARED, stock, theirs
from polycom_ext.integrations.huggingface.tokenizer import FILE, SETTINGS, Tokenizer
from polycom_ext.integrations.huggingface.weights import INDEX

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).parent
GENERATION = "generation_config.json"
CODE = ("activation_polycom.py", "configuration_polycom.py", "modeling_polycom.py")


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
        kept = {own.calls.get(key, key): model.config[key] for key in keys}
        kept |= {**own.says, "hidden_act": own.activations[model.config["activation"]["name"]]}
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
        new = theirs(own, name)
        if "{expert}" not in new:
            yield new, read
            continue
        stack = read()
        for expert in range(model.config["num_experts"]):
            yield new.format(expert=expert), lambda expert=expert, stack=stack: stack[expert].contiguous()  # type: ignore[misc]


class Folders:
    """Reads and writes them."""

    def find(self, path: Path) -> Found | None:
        return Found(path) if (path / "config.json").is_file() else None

    def read(self, path: Path) -> Model:
        return reading.read(path)

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
        shared = tensor.untyped_storage().nbytes() > tensor.nbytes  # with others, or with a file
        shard[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
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
    _write_beside(folder, model, options, config)
    _write_json(folder / "config.json", config)
    if config["model_type"] == "polycom":
        for name in CODE:
            shutil.copyfile(HERE / name, folder / name)


def _write_beside(folder: Path, model: Model, options: Options, config: dict[str, Any]) -> None:
    """The tokenizer and how the model generates: the model's own, unless a tokenizer was named."""
    carried = dict(model.files)
    given = options.tokenizer or (None if SETTINGS in carried else carried.get(FILE))
    if given is not None:
        tokenizer = Tokenizer(given, config["vocab_size"])
        if config["eos_token_id"] is None:
            config["eos_token_id"] = tokenizer.eos_id
        tokenizer.write(folder, config)
        carried = {name: path for name, path in carried.items() if name == GENERATION}
    if given is not None or GENERATION not in carried:
        generation = reading.told(carried.pop(GENERATION)) if GENERATION in carried else {}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if config[key] is not None:
                generation.setdefault(key, config[key])
        _write_json(folder / GENERATION, generation)
    for name, path in carried.items():
        shutil.copyfile(path, folder / name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
