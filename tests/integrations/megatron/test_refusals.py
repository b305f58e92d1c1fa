"""What cannot be right ends in one sentence and exit status 2, before training starts."""

import re
from pathlib import Path

import pytest

from .conftest import Trainer
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
