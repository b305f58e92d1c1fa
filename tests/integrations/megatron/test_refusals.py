"""What cannot be right ends in one sentence and exit status 2, before training starts."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from polycom_ext.activations import REGISTRY, Activation
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron.config import _reason_against, check_arguments

from .conftest import BIASES, Trainer
from .test_layouts import MOE_MODEL

REFUSED = {
    "an unknown activation": ("--polycom-activation polynom", 1, "unknown activation 'polynom'"),
    "an order for what has none": ("--polycom-activation relu-2", 1, "has no polynomial"),
    "upstream's own activation": ("--polycom-activation swiglu", 1, "pass its flag"),
    "a gate": ("--polycom-activation polynorm --swiglu", 1, "remove --swiglu"),
    "a second activation": ("--polycom-activation polynorm --squared-relu", 1, "remove --squared-relu"),
    "Transformer Engine's activation": (
        "--polycom-activation polynorm --use-te-activation-func",
        1,
        "remove",
    ),
    "router weights on a normalised input": (
        " ".join(["--polycom-activation polynorm --moe-apply-probs-on-input", *MOE_MODEL]).replace(
            "--moe-router-topk 2", "--moe-router-topk 1"
        ),
        1,
        "--moe-apply-probs-on-input",
    ),
    "tensor parallelism that does not divide the width": (
        "--polycom-activation polynorm --tensor-model-parallel-size 2 --ffn-hidden-size 49",
        2,
        "49",
    ),
    "expert tensor parallelism of its own without expert parallelism, GELU too": (
        " ".join(
            ["--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1", *MOE_MODEL]
        ),
        2,
        "--expert-tensor-parallel-size 1 other than --tensor-model-parallel-size 2",
    ),
    "losses by the token with the router's under tensor parallelism": (
        " ".join(
            [
                "--polycom-activation polynorm --tensor-model-parallel-size 2 --sequence-parallel "
                "--calculate-per-token-loss",
                *MOE_MODEL,
            ]
        ),
        2,
        "--calculate-per-token-loss weighs",
    ),
    "recomputing an MLP with biases, GELU too": (
        f"{BIASES} --no-bias-gelu-fusion --recompute-granularity selective --recompute-modules mlp",
        1,
        "--recompute-modules mlp needs --disable-bias-linear",
    ),
    "experts with biases under tensor parallelism, GELU too": (
        " ".join(
            [
                f"{BIASES} --no-bias-gelu-fusion --tensor-model-parallel-size 2 --sequence-parallel "
                "--expert-tensor-parallel-size 1 --expert-model-parallel-size 2",
                *MOE_MODEL,
            ]
        ),
        2,
        "sum the gradients of different experts' biases",
    ),
    "recomputing Megatron's own activation in an MLP": (
        "--recompute-granularity selective --recompute-modules mlp_act",
        1,
        "Invalid choices for recompute_modules: {'mlp_act'}",
    ),
    "recomputing the activation of overlapped shared experts": (
        " ".join(
            [
                "--polycom-activation polynorm --recompute-granularity selective --recompute-modules mlp_act "
                "--moe-shared-expert-intermediate-size 24 --moe-shared-expert-overlap",
                *MOE_MODEL,
            ]
        ),
        1,
        "--moe-shared-expert-overlap goes past mlp_act",
    ),
    "upcycling": (
        " ".join(
            [
                "--polycom-activation polynorm --moe-use-upcycling --save /nowhere --save-interval 2",
                *MOE_MODEL,
            ]
        ),
        1,
        "--moe-use-upcycling",
    ),
}


@pytest.mark.parametrize(
    ("activation", "asked", "words"),
    [
        ("polynorm", {"use_torch_fsdp2": True, "bf16": True}, "--use-torch-fsdp2 wants one type"),
        ("polyrelu", {"use_megatron_fsdp": True}, "remove it"),
        ("polynorm", {"use_torch_fsdp2": True}, None),
        ("relu", {"use_torch_fsdp2": True, "bf16": True, "use_megatron_fsdp": True}, None),
        (None, {"use_torch_fsdp2": True, "bf16": True, "use_megatron_fsdp": True}, None),
    ],
)
def test_what_shards_parameters_wants_one_type_of_them(
    activation: str | None, asked: dict[str, bool], words: str | None
) -> None:
    """On what upstream's arguments and configuration hold: it asks for a GPU before it comes to that."""
    names = ("use_torch_fsdp2", "use_megatron_fsdp", "bf16", "moe_use_upcycling")
    args = SimpleNamespace(**{**dict.fromkeys(names, False), **asked})
    config: Any = SimpleNamespace(
        polycom_activation=activation,
        num_moe_experts=None,
        tensor_model_parallel_size=1,
        expert_tensor_parallel_size=1,
        add_bias_linear=False,
    )
    if words is None:
        check_arguments(args, config)
    else:
        with pytest.raises(PolycomError, match=words):
            check_arguments(args, config)


@pytest.mark.parametrize("what", REFUSED)
def test_refused(train: Trainer, tmp_path: Path, what: str) -> None:
    options, processes, words = REFUSED[what]
    run = train(*options.replace("/nowhere", str(tmp_path)).split(), processes=processes)
    assert 2 in run.statuses
    sentences = re.findall(r"^polycom: error: (.*)$", run.log, re.MULTILINE)
    assert sentences
    assert words in sentences[0]
    assert "Traceback" not in run.log
    assert run.metrics == {}


def test_going_on_for_longer_says_which_argument_the_checkpoint_disagrees_with(
    train: Trainer, tmp_path: Path
) -> None:
    """Of the schedule's length the learning rate is a function; upstream asserts it while it loads."""
    kept = ["--save", str(tmp_path / "kept"), "--load", str(tmp_path / "kept"), "--save-interval", "1"]
    train(*kept, iterations=1)
    run = train(*kept, iterations=3)
    assert run.statuses == [2]
    assert run.metrics == {}
    (sentence,) = re.findall(r"^polycom: error: (.*)$", run.log, re.MULTILINE)
    assert "total number of iterations do not match" in sentence


def test_a_gate_of_another_package_has_no_place() -> None:
    gated = Activation("geglu", "GeGLU", "elsewhere:GeGLU", gated=True)
    assert "take an ungated one" in str(_reason_against(SimpleNamespace(), gated))
    megatrons = REGISTRY["swiglu"]
    assert "pass its flag (--swiglu)" in str(_reason_against(SimpleNamespace(), megatrons))
