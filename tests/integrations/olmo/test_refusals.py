"""What cannot train, or not rightly, is one sentence and exit status 2 before the first step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polycom_ext.errors import PolycomError

from .conftest import MODEL, MOE, flat


def model(**changes: Any) -> dict[str, Any]:
    return {"model": changes}


def moe(**changes: Any) -> dict[str, Any]:
    return {"model": MOE | changes}


CONFIGURATIONS: list[tuple[dict[str, Any], str]] = [
    (moe(moe_num_experts=None), "model.moe_num_experts must be a number in a model of experts, not null"),
    (moe(moe_top_k=None), "model.moe_top_k must be a number"),
    (moe(moe_top_k=0), "model.moe_top_k 0 is not in 1..4"),
    (moe(moe_mlp_impl=None), "must be sparse or grouped"),
    (moe(moe_loss_weight=-1.0), "model.moe_loss_weight must be at least 0, not -1.0"),
    (moe(init_fn="fan_in"), "model.init_fn: fan_in is not there in OLMo; take normal"),
    (moe(init_fn="kaiming_normal"), "model.init_fn: kaiming_normal"),
    (model(init_fn="fan_in"), "model.init_fn: fan_in"),
    (model(n_heads=3), "model.n_heads 3 does not divide model.d_model 32"),
    (model(n_heads=0), "model.n_heads must be at least 1, not 0"),
    (model(n_heads=4, n_kv_heads=3), "model.n_kv_heads 3 does not divide model.n_heads 4"),
    (model(n_heads=32), "a head has 1 of them"),
    (model(d_model=0), "model.d_model must be at least 1"),
    (model(n_layers=0), "model.n_layers must be at least 1"),
    (model(mlp_hidden_size=0), "model.mlp_hidden_size must be at least 1"),
    (model(mlp_hidden_size=None, mlp_ratio=0), "model.mlp_ratio must be at least 1"),
    (model(max_sequence_length=0), "model.max_sequence_length must be at least 1"),
    (model(vocab_size=-3), "model.vocab_size must be at least 1"),
    (model(eos_token_id=257), "model.eos_token_id 257 is beyond the 257 tokens"),
    (model(pad_token_id=-1), "model.pad_token_id must be at least 0"),
    (model(attention_dropout=1.5), "model.attention_dropout must be from 0 to 1, not 1.5"),
    (model(clip_qkv=-1.0), "model.clip_qkv must be above 0"),
    (model(init_std=-1.0), "model.init_std must be at least 0"),
    (model(block_type="transformer"), "model.block_type"),
    (model(d_model="big"), "model.d_model"),
    ({"optimizer": {"learning_rate": -1e-3}}, "optimizer.learning_rate must be at least 0, not -0.001"),
    ({"optimizer": {"learning_rate": ".nan"}}, "optimizer.learning_rate must be at least 0, not nan"),
    ({"optimizer": {"weight_decay": -1.0}}, "optimizer.weight_decay must be at least 0"),
    ({"optimizer": {"betas": [0.9, 1.5]}}, "optimizer.betas must be at least 0 and below 1, not 1.5"),
    ({"optimizer": {"betas": [0.9]}}, "length 1 does not match"),
    ({"optimizer": {"eps": -1.0}}, "optimizer.eps must be at least 0"),
    ({"optimizer": {"name": "adam"}}, "optimizer.name"),
    ({"optimizer": 3}, "OptimizerConfig"),
    ({"scheduler": {"name": "cosine"}}, "expected one of [cosine_with_warmup, linear_with_warmup"),
    ({"scheduler": {"units": "epochs"}}, "expected one of [steps, tokens]"),
    ({"scheduler": {"t_warmup": -5}}, "scheduler.t_warmup must be at least 0"),
    ({"scheduler": {"alpha_f": -5.0}}, "scheduler.alpha_f must be at least 0"),
    (
        {"max_duration": "2 epochs"},
        "max_duration '2 epochs' must be at least 1 step (10000), token (2e12T) or ep",
    ),
    ({"max_duration": "1e3X"}, "max_duration '1e3X'"),
    ({"max_duration": 0}, "max_duration '0'"),
    ({"max_duration": -3}, "max_duration '-3'"),
    ({"max_duration": "0ep"}, "max_duration '0ep'"),
    ({"stop_at": 0}, "stop_at must be at least 1"),
    ({"max_grad_norm": -1.0}, "max_grad_norm must be above 0, not -1.0"),
    ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
    ({"global_train_batch_size": 0}, "global_train_batch_size must be at least 1"),
    ({"device_train_microbatch_size": 0}, "device_train_microbatch_size must be at least 1"),
    ({"device_eval_batch_size": 0}, "device_eval_batch_size must be at least 1"),
    ({"save_interval": 0}, "save_interval must be at least 1"),
    ({"eval_interval": 0}, "eval_interval must be at least 1"),
    ({"console_log_interval": 0}, "console_log_interval must be at least 1"),
    ({"seed": -1}, "seed must be at least 0"),
    ({"data": {"num_workers": -1}}, "data.num_workers must be at least 0"),
    ({"data": {"memmap_dtype": "uint17"}}, "data.memmap_dtype must be a type of integers, not uint17"),
    ({"data": {"memmap_dtype": "float32"}}, "data.memmap_dtype must be a type of integers"),
    ({"data": {"generate_doc_lengths": True}}, "data.generate_doc_lengths masks documents, which needs"),
    ({"fused_loss": True}, "fused_loss needs the package flash-attn"),
    ({"precision": "bf16"}, "precision must be one of fp32, amp_bf16, amp_fp16, not bf16"),
    ({"precision": None}, "precision must be one of"),
    ({"compile": {"backend": "nope"}}, "compile.backend: torch has no 'nope'"),
    ({"fsdp": {"sharding_strategy": "ALL"}}, "expected one of [FULL_SHARD"),
    ({"activation_checkpointing": "sometimes"}, "expected one of [whole_layer"),
    ({"evaluators": [{"label": "x", "foo": 1}]}, "Key 'foo' not in 'EvaluatorConfig'"),
    (
        {"evaluators": [{"label": "x", "device_eval_batch_size": 0}]},
        "x: device_eval_batch_size must be at least 1",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), CONFIGURATIONS, ids=lambda part: str(part)[:60])
def test_a_configuration_is_refused(olmo: None, inputs: dict[str, Any], change: Any, sentence: str) -> None:
    from olmo.exceptions import OLMoConfigurationError

    from polycom_ext.integrations.olmo.train import parse

    settings = {key: value for key, value in inputs.items() if key != "valid_path"}
    options = flat(settings) | flat({"model": MODEL | {"activation_type": "polynorm"}}) | flat(change)
    with pytest.raises((PolycomError, OLMoConfigurationError)) as refusal:
        parse(
            [f"--{name}={value if value == '.nan' else json.dumps(value)}" for name, value in options.items()]
        )
    assert sentence in str(refusal.value)


def test_a_mixture_of_experts_needs_a_torch_that_multiplies_groups(
    olmo: None, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from polycom_ext.integrations.olmo.train import parse

    settings = {key: value for key, value in inputs.items() if key != "valid_path"}
    options = flat(settings) | flat({"model": MODEL | MOE | {"activation_type": "polynorm"}})
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    with pytest.raises(PolycomError, match=r"block_type: .* moe needs torch 2\.10, and this is"):
        parse([f"--{name}={json.dumps(value)}" for name, value in options.items()])


def test_the_tests_configuration_is_not_refused(olmo: None, inputs: dict[str, Any]) -> None:
    from polycom_ext.integrations.olmo.train import parse

    settings = {key: value for key, value in inputs.items() if key != "valid_path"}
    options = flat(settings) | flat({"model": MODEL | MOE | {"activation_type": "polynorm"}})
    for duration in (8, "8", "1e9T", "2e12T", "0.5e6 T", "2ep"):
        options["max_duration"] = duration
        parse([f"--{name}={json.dumps(value)}" for name, value in options.items()])


def file(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


INPUTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "tokenizer /nowhere/t.json: does not exist": lambda folder: {
        "tokenizer": {"identifier": "/nowhere/t.json"}
    },
    "bad.json: EOF while parsing": lambda folder: {
        "tokenizer": {"identifier": file(folder, "bad.json", b"{")}
    },
    "latin.json: stream did not contain valid UTF-8": lambda folder: {
        "tokenizer": {"identifier": file(folder, "latin.json", b'{"a": "\xff"}')}
    },
    "other.json: Model missing": lambda folder: {
        "tokenizer": {"identifier": file(folder, "other.json", b"{}")}
    },
    "data holds 0 whole sequences of 32 tokens, fewer than global_train_batch_size 4": lambda folder: {
        "data": {"paths": [file(folder, "short.npy", b"\0" * 62)]}
    },
    "data holds 2 whole sequences": lambda folder: {
        "data": {"paths": [file(folder, name, b"\0" * 66) for name in ("a.npy", "b.npy")]}
    },
    "evaluators: few holds 0 whole sequences": lambda folder: {
        "evaluators": [{"label": "few", "data": {"paths": [file(folder, "short.npy", b"\0" * 62)]}}]
    },
    "gone.npy does not exist": lambda folder: {"data": {"paths": [str(folder / "gone.npy")]}},
    "s3://bucket/x: Unable to locate credentials": lambda folder: {"remote_save_folder": "s3://bucket/x"},
    "gs://bucket/x: Your default credentials": lambda folder: {"remote_save_folder": "gs://bucket/x"},
    "data: Unable to locate credentials": lambda folder: {"data": {"paths": ["s3://bucket/a.npy"]}},
    "OLMo cannot build this: NotImplementedError: find_latest_checkpoint": lambda folder: {
        "remote_save_folder": "ftp://host/x"
    },
    "load_path: /nowhere/step3 does not exist": lambda folder: {"load_path": "/nowhere/step3"},
}


@pytest.mark.parametrize("sentence", INPUTS)
def test_an_input_is_refused(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentence: str
) -> None:
    run = train(**INPUTS[sentence](tmp_path))
    assert sentence in run.refusal
    assert ("Traceback" in run.log) == ("OLMo cannot build" in sentence), "upstream's own stays in the log"
    assert not run.metrics
