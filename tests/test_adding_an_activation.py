"""Somebody else's activations, examples/own-activation, installed as its user would install them."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polycom_ext import activations
from polycom_ext.cli import main
from polycom_ext.errors import PolycomError
from polycom_ext.modules import coefficients

EXAMPLE = Path(__file__).parents[1] / "examples" / "own-activation"
SMALL = """
    num-layers=2 hidden-size=32 seq-length=32 max-position-embeddings=32 global-batch-size=4
    micro-batch-size=2 train-data-path=null valid-data-path=null mock-data=true train-iters=6
    lr-warmup-iters=2 save-interval=6 eval-interval=6 eval-iters=1 log-interval=1
""".split()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(EXAMPLE, folder / "source")  # where setuptools leaves its own files
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*pip, "--target", str(folder / "site"), str(source)], check=True, capture_output=True)
    return folder / "site"


@pytest.fixture
def own(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(installed)
    monkeypatch.setenv("PYTHONPATH", str(installed))


@pytest.mark.usefixtures("own")
def test_it_is_one_of_the_registry() -> None:
    assert set(activations.names()) - set(activations.REGISTRY) == {"lisht", "elu"}
    x = torch.randn(3, 8)
    assert torch.equal(activations.build("lisht")(x), x * x.tanh())
    module = activations.build("elu", dtype=torch.float64)
    module(x.double()).square().sum().backward()
    assert module.get_parameter("alpha").grad is not None
    assert coefficients(module) == {"alpha": 1.0}
    assert activations.parse("elu")[1] is None
    with pytest.raises(PolycomError, match="no order can be given: 'elu-2'"):
        activations.parse("elu-2")


class Wide(nn.Module):
    """Asks for its width, and learns a matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(width, width))


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("target", "learnable", "sizes", "reason"),
    [
        ("torch.nn:PReLU", False, {}, r"'lisht' says learnable=False and has parameters \['weight'\]"),
        ("own_activation:Wide", True, {}, "'lisht' needs `width`, which build was not given"),
        ("own_activation:Wide", True, {"width": 3}, r"matrix must be one-dim.* \(3, 3\)"),
    ],
)
def test_what_an_entry_says_wrongly_is_named(
    monkeypatch: pytest.MonkeyPatch, target: str, learnable: bool, sizes: dict[str, Any], reason: str
) -> None:
    package = importlib.import_module("own_activation")
    monkeypatch.setattr(package, "Wide", Wide, raising=False)
    entry = activations.Activation("lisht", "LiSHT", target, learnable=learnable)
    monkeypatch.setattr(package, "LISHT", entry)
    with pytest.raises(PolycomError, match=reason):
        activations.build("lisht", **sizes)
    monkeypatch.setattr(package, "LISHT", package.ELU)
    with pytest.raises(PolycomError, match="is no Activation 'lisht'"):
        activations.build("lisht")


@pytest.mark.parametrize("broken", ["the package", "the entry's target"])
def test_one_that_cannot_be_imported_is_a_sentence(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "broken-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{activations.GROUP}]\nbroken = broken_entry:ENTRY\n")
    if broken == "the entry's target":
        (tmp_path / "broken_entry.py").write_text(
            "from polycom_ext.activations import Activation\n"
            "ENTRY = Activation('broken', 'Broken', 'no_such_module:f')\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    sentence = r"activation 'broken' cannot be imported from .*: No module named"
    with pytest.raises(PolycomError, match=sentence):
        activations.build("broken")
    sys.modules.pop("broken_entry", None)


@pytest.mark.full
@pytest.mark.usefixtures("own")
def test_it_trains_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["ffn_width=96", *(f"megatron.{option}" for option in SMALL)]
    overrides = [word for option in options for word in ("--set", option)]
    assert main(["run", str(EXAMPLE / "elu.yaml"), *overrides, "--output", "elu"]) == 0
    learned = json.loads(Path("elu/coefficients.json").read_text())
    assert [set(layer) for layer in learned["layers"]] == [{"name", "alpha"}] * 2
    assert all(1e-4 < abs(layer["alpha"][0] - 1) < 0.1 for layer in learned["layers"])
    assert main(["report", "elu", "--output", "report"]) == 0
    assert "ELU-α" in Path("report/index.html").read_text()
    assert len(list(Path("report").glob("*-coefficients.png"))) == 1
