"""OLMo 0.6.0 with our MoE layer against the pinned MoE branch with its fork of megablocks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from polycom_ext import cli
from polycom_ext.integrations.olmo import exchange, options
from polycom_ext.integrations.olmo.conversion import STEP

from .conftest import Trainer
from .test_conversion_refusals import CONFIG

pytestmark = pytest.mark.github

SHAPE = {
    "d_model": 32,
    "n_heads": 2,
    "n_layers": 2,
    "block_type": "moe",
    "rope": True,
    "attention_layer_norm": True,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "layer_norm_type": "rms",
    "bias_for_layer_norm": False,
    "include_bias": False,
    "weight_tying": False,
    "max_sequence_length": 16,
    "vocab_size": 64,
    "embedding_size": 64,
    "init_device": "cpu",
    "init_std": 0.2,
    "mlp_hidden_size": 256,
    "moe_num_experts": 8,
    "moe_top_k": 2,
    "moe_loss_weight": 0.01,
    "moe_zloss_weight": 0.001,
}
ACTIVATIONS = ("swiglu", "gelu", "relu2", "polyrelu", "polynorm", "polynorm-4", "polyrelunorm", "polyprelu")
CASES: list[dict[str, Any]] = [
    {"activation_type": activation, "moe_mlp_impl": layout}
    for activation in ACTIVATIONS
    for layout in ("sparse", "grouped")
]
CASES += [
    {"activation_type": "polynorm", "moe_dropless": False, "moe_capacity_factor": 4.0},
    {"activation_type": "polynorm", "include_bias": True, "moe_mlp_impl": "sparse"},
    {"activation_type": "swiglu", "moe_shared_expert": True, "moe_mlp_impl": "sparse"},
    {"activation_type": "polynorm", "moe_lbl_in_fp32": True, "moe_mlp_impl": "grouped", "moe_num_experts": 4},
]


def name_of(case: dict) -> str:
    return ", ".join(f"{key.removeprefix('moe_')}={value}" for key, value in case.items())


@pytest.fixture(scope="module")
def branch(branch_paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the branch computes, by case."""
    output = tmp_path_factory.mktemp("branch") / "results.pt"
    script = Path(__file__).with_name("branch_model.py")
    released = branch_paths[0] / "configs" / "official" / "OLMoE-7B-A1B.yaml"
    environment = {"PYTHONPATH": os.pathsep.join(map(str, branch_paths)), "OMP_NUM_THREADS": "1"}
    cases = [json.dumps(SHAPE | case) for case in CASES]
    subprocess.run(
        [sys.executable, "-W", "ignore", script, output, released, *cases],
        env={**os.environ, **environment},
        check=True,
    )
    return torch.load(output, weights_only=False)


def ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Error as a ratio of norms; where nothing is expected, as it is."""
    norm = expected.double().norm()
    return float((actual.double() - expected.double()).norm() / (norm if norm > 1e-12 else 1.0))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_our_block_is_the_branchs(branch: dict, olmo: None, case: dict) -> None:
    from olmo.config import ModelConfig
    from olmo.model import OLMo

    from polycom_ext.integrations.olmo.experts import MoE
    from polycom_ext.integrations.olmo.router import load_balancing_loss, z_loss

    expected = branch[json.dumps(SHAPE | case)]
    config = ModelConfig(**(SHAPE | case | {"moe_dropless": True}))
    model = OLMo(config)
    state = expected["state"]
    if not case.get("moe_dropless", True):  # (experts, d_model, ffn) and (experts, ffn, d_model)
        state = {
            name: (tensor.transpose(1, 2) if name.endswith("w1") else tensor).reshape(-1, config.d_model)
            if "experts.mlp" in name
            else tensor
            for name, tensor in state.items()
        }
    model.load_state_dict(state, strict=True)
    logits = model(expected["tokens"]).logits
    layers = [layer.routing for layer in model.modules() if isinstance(layer, MoE)]
    routings = [routing for routing in layers if routing is not None]
    assert len(routings) == len(layers)
    load_balancing = config.moe_loss_weight * load_balancing_loss(routings, 2, config.moe_lbl_in_fp32)
    z = config.moe_zloss_weight * z_loss(routings, 2, config.moe_lbl_in_fp32)
    (logits.square().mean() + load_balancing + z).backward()

    counts = torch.stack([routing.tokens_per_expert for routing in routings])
    assert counts.tolist() == expected["tokens_per_expert"].tolist()
    assert ratio(logits, expected["logits"]) < 2e-6
    assert ratio(load_balancing, expected["load_balancing"]) < 1e-6
    assert ratio(z, expected["z"]) < 1e-6
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(grads) == set(expected["grads"])
    for name, grad in expected["grads"].items():
        if not case.get("moe_dropless", True) and name.endswith("w1"):
            grad = grad.transpose(1, 2)
        assert grad.any(), name
        assert ratio(grads[name], grad.reshape(grads[name].shape)) < 1e-5, name


CONVERTED = [
    *({"activation_type": activation, "moe_mlp_impl": "sparse"} for activation in ("swiglu", "polynorm-4")),
    {"activation_type": "polyprelu", "moe_mlp_impl": "grouped"},
]


@pytest.mark.full
@pytest.mark.parametrize("case", CONVERTED, ids=name_of)
def test_the_branchs_experts_are_converted(branch: dict, olmo: None, case: dict, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from olmo.config import ModelConfig, TrainConfig

    from polycom_ext.integrations import huggingface

    huggingface.register()
    expected = branch[json.dumps(SHAPE | case)]
    (tmp_path / "branch").mkdir()
    torch.save(expected["state"], tmp_path / "branch" / "model.pt")
    TrainConfig(model=ModelConfig(**(SHAPE | case))).save(tmp_path / "branch" / "config.yaml")
    assert cli.main(["convert", str(tmp_path / "branch"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)


def test_a_converted_configuration_has_only_fields_of_the_branchs_own(branch_paths: list[Path]) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "qk_norm": "row"}
    told = exchange.written({**CONFIG, **experts}, "models/it")
    assert told["block_type"] == "moe"
    assert {f"model.{name}" for name in told} <= options.known(branch_paths[0])


def test_some_cases_have_experts_without_a_token(branch: dict) -> None:
    assert any((branch[json.dumps(SHAPE | case)]["tokens_per_expert"] == 0).any() for case in CASES)


def test_the_released_configuration_is_the_same_model(
    branch: dict, branch_paths: list[Path], olmo: None
) -> None:
    from olmo.config import TrainConfig
    from olmo.model import OLMo

    path = branch_paths[0] / "configs" / "official" / "OLMoE-7B-A1B.yaml"
    model = OLMo(TrainConfig.load(path, validate_paths=False).model)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == branch["released"]
    assert model.num_params() == 6_919_161_856, "OLMoE-1B-7B-0924"


POLYNORM = {"activation_type": "polynorm", "mlp_hidden_size": 256}
LAYOUTS: dict[str, dict[str, Any]] = {
    "sparse": {"moe_mlp_impl": "sparse"},
    "grouped": {"moe_mlp_impl": "grouped"},
    "capacity": {"moe_dropless": False},
}


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kill_and_resume_on_the_branch_is_the_straight_run(train_branch: Trainer, layout: str) -> None:
    settings: dict[str, Any] = {
        "moe": True,
        "processes": 2,
        "save_interval": 3,
        "model": POLYNORM | LAYOUTS[layout],
    }
    straight = train_branch(**settings)
    killed = train_branch(kill_at=5, **settings)
    resumed = train_branch(folder=killed.folder, **settings)
    losses = straight.series("train/loss")
    assert losses[6] < losses[1] - 0.3
    assert resumed.series("train/loss") == losses
    assert resumed.series("train/router_z_loss") == straight.series("train/router_z_loss")
    assert resumed.coefficients == straight.coefficients
    assert max(abs(value - 1 / 3) for value in straight.coefficients["layers"][1]["weight"]) > 1e-3


GOES_ON: dict[str, dict[str, Any]] = {
    "sparse": {**POLYNORM, **LAYOUTS["sparse"]},
    "grouped, norms after": {**POLYNORM, **LAYOUTS["grouped"], "norm_after": True},
    "gated": {"activation_type": "swiglu", "mlp_hidden_size": 256, **LAYOUTS["sparse"]},
}


@pytest.mark.long
@pytest.mark.parametrize("name", GOES_ON)
def test_training_on_the_branch_goes_on_from_what_was_converted(
    train_branch: Trainer, name: str, tmp_path: Path
) -> None:
    """Through Hugging Face's form and back, as from the checkpoint that it was."""
    settings: dict[str, Any] = {"moe": True, "processes": 2, "model": GOES_ON[name], "max_duration": 4}
    first = train_branch(**settings, save_interval_unsharded=4)
    own = first.folder / "checkpoints" / "step4-unsharded"
    for source, target, form in ((own, "hf", "hf"), (tmp_path / "hf", "olmo", "olmo")):
        assert cli.main(["convert", str(source), str(tmp_path / target), "--to", form]) == 0
    reset: dict[str, Any] = {"reset_optimizer_state": True, "reset_trainer_state": True}
    losses = [
        train_branch(**settings, **reset, load_path=str(path)).series("train/loss")
        for path in (tmp_path / "olmo" / STEP, own)
    ]
    assert losses[0] == losses[1]
    assert losses[0][1] < first.series("train/loss")[1] - 0.1, "not from scratch"
    assert losses[0][4] < losses[0][1]


def test_downstream_tasks_on_the_branch_are_060s_questions(train_branch: Trainer) -> None:
    tasks = ("copa", "piqa", "mmlu_stem_var")
    run = train_branch(
        moe=True,
        max_duration=1,
        evaluators=[{"label": task, "type": "downstream", "subset_num_batches": 1} for task in tasks],
        device_eval_batch_size=4,
        model=POLYNORM | {"max_sequence_length": 512},
    )
    for task in tasks:
        assert 0 <= run.metrics[1][f"eval/{task}/acc"] <= 1


REFUSALS: dict[str, dict[str, Any]] = {
    "must both be above 0": {"moe_zloss_weight": None},
    "not a multiple of 128": {"moe_mlp_impl": "sparse", "mlp_hidden_size": 192},
    "has no gate in megablocks": {"activation_type": "swiglu", "moe_dropless": False},
    "moe_shared_expert": {"moe_shared_expert": True},
    "would leave transformer.blocks.0.ffn.shared_expert.": {
        "activation_type": "swiglu",
        "moe_shared_expert": True,
        "init_device": "meta",
    },
}


@pytest.mark.parametrize("sentence", REFUSALS)
def test_what_megablocks_cannot_do_is_refused_in_a_sentence(train_branch: Trainer, sentence: str) -> None:
    run = train_branch(moe=True, model=POLYNORM | REFUSALS[sentence])
    assert sentence in run.refusal
    assert "Traceback" not in run.log
