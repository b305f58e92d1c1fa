"""Folders of Hugging Face are read: ours, those of transformers' classes, those in the authors' layouts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoConfig,
    OlmoeConfig,
    PretrainedConfig,
)

from polycom_ext import cli
from polycom_ext.checkpoints.constants import complete
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.huggingface.configuration_polycom import REQUIRED
from polycom_ext.integrations.huggingface.stock import UNGATED

from .conftest import KINDS, PLAIN, made, tokens

SIZES: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"bos_token_id": None, "eos_token_id": 5, "pad_token_id": None},
}
CLASSES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, rope_theta=5000.0, rms_norm_eps=1e-3),
    "llama, tied, biases": LlamaConfig(
        **SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=16
    ),
    **{act: ArceeConfig(**SIZES, hidden_act=act, mlp_bias=True) for act in UNGATED},
    "olmo": OlmoConfig(**SIZES, clip_qkv=0.05),
    "olmo2": Olmo2Config(**SIZES, rms_norm_eps=1e-3),
    "olmoe": OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "olmoe, normalised": OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


def stock(kind: str) -> Any:
    """A model of a class of transformers', in which each constant shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CLASSES[kind]).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def convert(source: Path, target: Path, *more: str) -> int:
    return cli.main(["convert", str(source), str(target), "--to", "hf", *more])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


IN_SHORT = ("olmo", "olmo2", "olmoe", "gated-experts", "mixtral")
"""Kinds with rows or rules of their own; the rest is like them."""
ALL = [*KINDS, *sorted(CLASSES.keys() - KINDS.keys())]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in IN_SHORT else pytest.mark.full) for kind in ALL]
)
def test_a_folder_comes_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    model = made(kind) if kind in KINDS else stock(kind)
    model.save_pretrained(tmp_path / "a", max_shard_size="30KB")
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    assert convert(tmp_path / "b", tmp_path / "c", "--shard-bytes", "10000") == 0
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 1
    assert same(tensors(tmp_path / "b"), tensors(tmp_path / "c"))
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert not any(told.values()), told
    with torch.no_grad():
        torch.testing.assert_close(
            again.eval()(tokens()).logits, model(tokens()).logits, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in ("relu2", *IN_SHORT) else pytest.mark.full) for kind in CLASSES],
)
def test_a_class_of_transformers_keeps_its_class_and_its_numbers(kind: str, tmp_path: Path) -> None:
    model = stock(kind)
    model.save_pretrained(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_a_class_that_has_no_width_of_heads_is_not_given_one(tmp_path: Path) -> None:
    model = made("gated-experts", qk_norm="row", head_dim=16)  # but for that an Olmoe
    model.save_pretrained(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_a_type_may_be_asked_for_and_coefficients_stay_float32(tmp_path: Path) -> None:
    made("olmoe").save_pretrained(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b", "--dtype", "bfloat16") == 0
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    for name, tensor in before.items():
        kind = torch.float32 if "act_fn" in name else torch.bfloat16
        assert torch.equal(after[name], tensor.to(kind)), name


def test_what_goes_with_a_model_goes_along(tmp_path: Path) -> None:
    stock("llama").save_pretrained(tmp_path / "a")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / "a" / name).write_text(json.dumps({"of": name}))
    (tmp_path / "a" / "anything.py").write_text("raise SystemExit('code that is not ours')")
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert json.loads((tmp_path / "b" / name).read_text()) == {"of": name}
    assert not (tmp_path / "b" / "anything.py").exists()


def words(path: Path, count: int) -> Path:
    """A tokenizer of so many words, of which the sixth ends a document."""
    vocabulary = {f"w{number}": number for number in range(count)}
    vocabulary["<|endoftext|>"] = vocabulary.pop("w5")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("kind", ["olmoe", "gated-experts"])
def test_a_tokenizer_that_is_named_goes_along_with_its_end_token(kind: str, tmp_path: Path) -> None:
    made(kind).save_pretrained(tmp_path / "a")
    path = words(tmp_path / "words.json", SIZES["vocab_size"])
    assert convert(tmp_path / "a", tmp_path / "b", "--tokenizer", str(path)) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert tokenizer("w7 w95").input_ids == [7, 95]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 5)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").generation_config.eos_token_id == 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ("{}", "words.json is not a tokenizer.json"),
        ("of another model", "gives the token 96, and the vocabulary of the model is 96"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made("llama").save_pretrained(tmp_path / "copy")
    path = tmp_path / "words.json"
    if content == "of another model":
        words(path, SIZES["vocab_size"] + 1)
    elif content is not None:
        path.write_text(content)
    refused(tmp_path, capsys, said, "--tokenizer", str(path))


@pytest.mark.parametrize("key", [*REQUIRED, "rope_theta"])
def test_every_constant_of_the_configuration_is_asked_for(key: str) -> None:
    complete(PLAIN, "it")
    with pytest.raises(PolycomError, match=f"it does not say {key}"):
        complete({name: value for name, value in PLAIN.items() if name != key}, "it")


@pytest.mark.parametrize("place", ["mlp.activation_func", "mlp.act", "mlp.act_fn", "act"])
@pytest.mark.parametrize("name", ["polynorm", "polyrelu"])
def test_the_layouts_of_the_authors_are_read(place: str, name: str, tmp_path: Path) -> None:
    model = made(name)
    model.save_pretrained(tmp_path / "ours")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    weights = {
        new: tensor.bfloat16()
        for old, tensor in tensors(tmp_path / "ours").items()
        for new in [old.replace("mlp.act_fn", place)]
    }
    save_file(weights, theirs / "model.safetensors", metadata={"format": "pt"})
    LlamaConfig(**{**SIZES, **PLAIN, "rope_theta": 5000.0}, hidden_act=name).save_pretrained(theirs)
    assert convert(theirs, tmp_path / "hf", "--dtype", "float32") == 0
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(told.values()), told
    stored = {tensor.dtype for name, tensor in tensors(tmp_path / "hf").items() if "act_fn" in name}
    assert stored == {torch.float32}
    model.load_state_dict({name: one.bfloat16().float() for name, one in model.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(tokens()).logits, model(tokens()).logits)


def test_pickled_weights_are_read(tmp_path: Path) -> None:
    model = stock("llama, tied, biases")
    model.config.save_pretrained(tmp_path / "a")
    torch.save(model.state_dict(), tmp_path / "a" / "pytorch_model.bin")
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_a_malicious_pickle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = stock("llama")
    model.config.save_pretrained(tmp_path / "copy")
    path = tmp_path / "copy" / "pytorch_model.bin"
    torch.save({**model.state_dict(), "evil": Malicious(f"touch {tmp_path / 'canary'}")}, path)
    refused(tmp_path, capsys, "pytorch_model.bin cannot be read without running code from it")
    assert not (tmp_path / "canary").exists()
    torch.load(path, weights_only=False)  # the file is as bad as it should be
    assert (tmp_path / "canary").exists()


def refused(folder: Path, capsys: pytest.CaptureFixture[str], said: str, *more: str) -> None:
    """Exit status 2, one sentence, and nothing that is half-written."""
    before = sorted(folder.iterdir())
    assert convert(folder / "copy", folder / "hf", *more) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert said in printed[-1]
    assert not any("Traceback" in line for line in printed)
    assert sorted(folder.iterdir()) == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One in shards, to be spoilt in copies."""
    path = tmp_path_factory.mktemp("folder")
    made("llama").save_pretrained(path, max_shard_size="30KB")
    return path


def says(**changes: Any) -> Callable[[Path], None]:
    """Change config.json; a key of None is taken away."""

    def change(copy: Path) -> None:
        told = json.loads((copy / "config.json").read_text())
        for key, value in changes.items():
            told.pop(key, None) if value is None else told.update({key: value})
        (copy / "config.json").write_text(json.dumps(told))

    return change


def file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(copy: Path) -> None:
        (copy / name).write_bytes(change((copy / name).read_bytes()))

    return spoil


FIRST, INDEX = "model-00001-of-*.safetensors", "model.safetensors.index.json"
ACTIVATION = {"name": "polynorm", "gated": False, "order": 3, "eps": 1e-6}
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard that is missing": (lambda copy: next(copy.glob(FIRST)).unlink(), "lacks model-00001-of-"),
    "a shard cut short": (
        lambda copy: os.truncate(next(copy.glob(FIRST)), next(copy.glob(FIRST)).stat().st_size - 1),
        "cannot be read",
    ),
    "an empty shard": (lambda copy: os.truncate(next(copy.glob(FIRST)), 0), "cannot be read"),
    "no weights": (lambda copy: (copy / INDEX).unlink(), "holds no weights"),
    "a torn index": (file(INDEX, lambda data: data[:-9]), "index.json cannot be read"),
    "an index of nothing": (file(INDEX, lambda data: b"[]"), "index.json cannot be read"),
    "an index that leaves the folder": (
        file(INDEX, lambda data: data.replace(b'"model-00001', b'"../model-00001')),
        "is no file beside it",
    ),
    "an index of other names": (
        file(INDEX, lambda data: data.replace(b"model.norm.weight", b"model.norma.weight")),
        "lacks model.norma.weight",
    ),
    "a torn configuration": (file("config.json", lambda data: data[:-9]), "config.json cannot be read"),
    "a configuration of nothing": (says(model_type=None), "does not say model_type"),
    "an unknown architecture": (says(model_type="gpt2"), "'gpt2' cannot be read; polycom, llama,"),
    "another vocabulary": (says(vocab_size=97), "has shape (96, 32), the model needs (97, 32)"),
    "another width": (says(intermediate_size=47), "has shape (48, 32), the model needs (47, 32)"),
    "another order": (says(activation={**ACTIVATION, "order": 2}), "has shape (3,), the model needs (2,)"),
    "more blocks": (says(num_hidden_layers=3), "has nothing for model.layers.2."),
    "more blocks than anyone waits for": (says(num_hidden_layers=10**9), "says 1000000000 layers, and holds"),
    "an eps that is no number": (says(rms_norm_eps=float("nan")), "rms_norm_eps nan"),
    "an eps below nothing": (says(rms_norm_eps=-1e-5), "rms_norm_eps -1e-05"),
    "an endless rope": (
        says(rope_theta=float("inf"), rope_parameters={"rope_theta": float("inf")}),
        "rope_theta inf",
    ),
    "a clip that is no number": (says(clip_qkv=float("nan")), "clip_qkv nan"),
    "a clip of nothing": (says(clip_qkv=-0.5), "clip_qkv -0.5"),
    "an eps of the activation's that is none": (
        says(activation={**ACTIVATION, "eps": float("inf")}),
        "activation.eps inf",
    ),
    "norms of another kind": (
        says(norm={"kind": "batch", "affine": True, "bias": False}),
        "norm.kind 'batch'",
    ),
    "queries normalised otherwise": (says(qk_norm="column"), "qk_norm 'column'"),
    "fewer blocks": (says(num_hidden_layers=1), "holds model.layers.1."),
    "an unknown activation": (
        says(activation={**ACTIVATION, "name": "polynone"}),
        "unknown activation 'polynone'",
    ),
    "another rope": (says(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope_type 'linear'"),
    "a rope of a word": (says(rope_scaling="linear"), "rope_scaling 'linear'"),
    "an index of numbers": (
        lambda copy: (copy / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": 5}})),
        "lacks 5, which",
    ),
    "quantised": (says(quantization_config={"bits": 4}), "quantization_config"),
    "no eps": (says(activation={"name": "polynorm", "gated": False, "order": 3}), "activation.eps"),
    "a gate that there is not": (says(activation={**ACTIVATION, "gated": True}), "activation.gated True"),
    "heads that share no keys": (says(num_key_value_heads=3), "num_key_value_heads 3"),
    "no heads": (says(num_key_value_heads=0), "num_key_value_heads 0"),
    "experts of which none is asked": (says(num_experts=2), "num_experts_per_tok 0"),
    "words for numbers": (says(hidden_size="32"), "hidden_size '32'"),
    "half a norm": (says(norm={"kind": "rms", "affine": True}), "norm.bias"),
    "no norm": (says(norm=None), "does not say norm"),
    "no rope_theta": (says(rope_theta=None, rope_parameters=None), "does not say rope_theta"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_folder_that_is_spoilt_is_refused(
    folder: Path, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    spoil, said = SPOILT[what]
    spoil(tmp_path / "copy")
    refused(tmp_path, capsys, said)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rms_norm_eps", None, "does not say rms_norm_eps"),
        ("rope_theta", None, "does not say rope_theta"),
        ("hidden_act", "gelu", "hidden_act 'gelu'"),
        ("hidden_act", None, "hidden_act None"),
        ("hidden_act", ["silu"], "hidden_act ['silu']"),
        ("hidden_act", "polynorm", "holds no coefficients of polynorm"),
        ("vocab_size", 95, "has shape (96, 32), the model needs (95, 32)"),
        ("mlp_bias", True, "has nothing for model.layers.0.mlp.gate_proj.bias"),
        ("num_hidden_layers", 1, "holds model.layers.1."),
    ],
)
def test_a_folder_of_transformers_class_that_says_too_little_is_refused(
    key: str, value: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock("llama").save_pretrained(tmp_path / "copy")
    says(**{key: value}, **({"rope_parameters": None} if key == "rope_theta" else {}))(tmp_path / "copy")
    refused(tmp_path, capsys, said)
