"""A checkpoint of one activation is not loaded into another, but by an option that says so."""

import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron.checkpoint import check_activation, constants

from .conftest import ENVIRONMENT, Run, Trainer

ON = "--override-opt_param-scheduler"  # nothing else stands in the way of going on
DEFAULT = f"--dist-ckpt-strictness assume_ok_unexpected {ON}"
STRICT = f"--dist-ckpt-strictness raise_all {ON}"
ALLOW = "--polycom-allow-other-activation"
POLYNORM = "polynorm (order 3, eps 1e-06)"

FLAGS = {"gelu": "", "swiglu": "--swiglu"}
"""Megatron's own; every other name is PolyCom's."""

REFUSED = {
    "PolyNorm into PolyReLU": ("polynorm", "polyrelu", DEFAULT, (POLYNORM, "polyrelu (order 3)")),
    "GELU into PolyNorm, whatever --use-checkpoint-args": (
        "gelu",
        "polynorm",
        f"{STRICT} --use-checkpoint-args",
        ("gelu", POLYNORM),
    ),
}
REFUSED_TOO = {
    "PolyNorm into GELU": ("polynorm", "gelu", DEFAULT, (POLYNORM, "gelu")),
    "GELU into PolyNorm": ("gelu", "polynorm", DEFAULT, ("gelu", POLYNORM)),
    "PolyNorm into PolyReLU, strict": ("polynorm", "polyrelu", STRICT, (POLYNORM, "polyrelu (order 3)")),
    "PolyNorm into GELU, strict": ("polynorm", "gelu", STRICT, (POLYNORM, "gelu")),
    "PolyPReLU into GELU": ("polyprelu", "gelu", DEFAULT, ("polyprelu (order 3)", "gelu")),
    "another order": ("polynorm", "polynorm-2", DEFAULT, (POLYNORM, "polynorm (order 2, eps 1e-06)")),
    "to fine-tune": ("polynorm", "polyrelu", f"{DEFAULT} --finetune", (POLYNORM, "polyrelu (order 3)")),
    "SwiGLU into PolyNorm": ("swiglu", "polynorm", DEFAULT, ("swiglu", POLYNORM)),
    "in the other format": ("polynorm", "gelu", f"--ckpt-format torch {ON}", (POLYNORM, "gelu")),
}


class Checkpoints:
    """A checkpoint of an activation at step 1, made once a format."""

    def __init__(self, train: Trainer, folder: Path) -> None:
        self._train, self._folder = train, folder

    def __call__(self, activation: str, *options: str) -> Path:
        path = self._folder / "-".join([activation, *options])
        if not path.exists():
            save = ("--save", str(path), "--save-interval", "1")
            self._train(*asked(activation), *options, *save, iterations=1)
        return path


def asked(activation: str) -> list[str]:
    return FLAGS.get(activation, f"--polycom-activation {activation}").split()


@pytest.fixture(scope="session")
def checkpoint(train: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(train, tmp_path_factory.mktemp("activations"))


def assert_refused(run: Run, words: tuple[str, str]) -> None:
    assert 2 in run.statuses
    assert run.metrics == {}
    sentences = re.findall(r"^polycom: error: (.*)$", run.log, re.MULTILINE)
    assert f"checkpoint's activation is {words[0]}, the arguments ask for {words[1]}:" in sentences[0]
    assert ALLOW in sentences[0]
    assert "Traceback" not in run.log


@pytest.mark.parametrize(
    "what", [*REFUSED, *(pytest.param(what, marks=pytest.mark.full) for what in REFUSED_TOO)]
)
def test_refused(train: Trainer, checkpoint: Checkpoints, what: str) -> None:
    saved, loaded, options, words = {**REFUSED, **REFUSED_TOO}[what]
    format_ = ("--ckpt-format", "torch") if "--ckpt-format torch" in options else ()
    path = checkpoint(saved, *format_)
    run = train(*asked(loaded), *options.split(), "--load", str(path), iterations=2)
    assert_refused(run, words)


def test_allowed_by_name(train: Trainer, checkpoint: Checkpoints) -> None:
    """The activation on the command line is the one that is trained, whatever --use-checkpoint-args."""
    options = [*asked("polyrelu"), *DEFAULT.split(), ALLOW, "--use-checkpoint-args"]
    run = train(*options, "--load", str(checkpoint("polynorm")), iterations=2)
    assert set(run.metrics) == {2}
    assert re.search(r"polycom_activation \.+ polyrelu$", run.log, re.MULTILINE)


@pytest.mark.full
def test_a_checkpoint_without_arguments_passes(train: Trainer, checkpoint: Checkpoints, tree: Path) -> None:
    path = checkpoint("polynorm", "--no-save-rng")
    script = "import sys, torch; f = sys.argv[1]; s = torch.load(f, weights_only=False); "
    script += "del s['args']; torch.save(s, f)"
    subprocess.run(
        [sys.executable, "-c", script, str(path / "iter_0000001" / "common.pt")],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(tree)},
        check=True,
    )
    options = [*asked("polyrelu"), *DEFAULT.split(), "--load", str(path), "--finetune"]
    assert set(train(*options, iterations=1).metrics) == {1}


def test_the_constants_are_compared_too() -> None:
    """As they were saved, whatever the name means by now; without them, the name tells."""
    args = Namespace(polycom_activation="polynorm")
    check_activation(args, Namespace(polycom_activation="polynorm-3"))
    check_activation(args, Namespace(polycom_activation="polynorm", polycom_constants=constants("polynorm")))
    other = Namespace(polycom_activation="polynorm", polycom_constants={"order": 3, "eps": 1e-5})
    with pytest.raises(PolycomError, match=r"eps 1e-05.*eps 1e-06"):
        check_activation(args, other)
    check_activation(Namespace(polycom_activation="polynorm", polycom_allow_other_activation=True), other)


def test_the_constants_are_those_of_the_function() -> None:
    assert constants("polynorm-4") == {"order": 4, "eps": 1e-6}
    assert constants("polyprelu") == {"order": 3}
    assert constants("xielu") == {"beta": 0.5, "eps": -1e-6}
    assert constants("swish") == constants("mish") == {}


def test_one_function_under_two_names_is_no_other() -> None:
    check_activation(Namespace(polycom_activation="relu2"), Namespace(squared_relu=True))
    check_activation(Namespace(polycom_activation="gelu"), Namespace(swiglu=False))
