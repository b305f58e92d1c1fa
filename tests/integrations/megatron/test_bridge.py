"""Megatron-Bridge loads and exports PolyCom models: its real modules, over Transformer Engine's stand-in."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM

from polycom_ext.checkpoints.command import convert
from polycom_ext.checkpoints.forms import Options
from polycom_ext.errors import PolycomError
from polycom_ext.integrations import huggingface
from polycom_ext.upstream import download

from .conftest import Trainer
from .test_conversion import TOKENS, options
from .test_on_transformer_engine import on_te  # noqa: F401  # a fixture
from .test_written import made

huggingface.register()
pytestmark = pytest.mark.long
VERSION, SHA256 = "0.3.1", "4d9a9ad679bd927a84f923e5239512d72af7fa47331b749a8f275592c2920616"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its files."""
    filename, folder = f"megatron_bridge-{VERSION}-py3-none-any.whl", tmp_path_factory.mktemp("bridge")
    try:
        wheel = download.from_pypi("megatron-bridge", VERSION, filename, SHA256)
    except PolycomError as error:
        if "reachable" not in str(error):
            raise
        pytest.skip(str(error))
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


KINDS = ("polynorm", "polyrelu-2", "xielu", "grouped queries", "biases", "layer norm", "tied", "experts")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_loaded_and_exported(
    on_te: Trainer,  # noqa: F811
    package: Path,
    kind: str,
    tmp_path: Path,
) -> None:
    hf, tokens = tmp_path / "hf", TOKENS % 96
    convert(made(kind), hf, "hf", Options())
    theirs = on_te.script("bridged.py", str(package), str(hf), json.dumps(tokens.tolist()), *options("gelu"))
    if kind == "experts":
        assert "which its bridge does not take over" in theirs
        return
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(hf).eval()(tokens).logits
    assert (torch.tensor(theirs) - ours).norm() / ours.norm() < 1e-5
