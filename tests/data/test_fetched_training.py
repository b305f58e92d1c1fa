"""The trainers of the paper's configs train on what recipes make of real text under the published names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from polycom_ext.data.corpora import corpus
from polycom_ext.data.tokenizer import train

from . import stand_in

TOP = Path(__file__).parents[2]
DOCUMENT = 3000
"""Characters of one, cut from a play."""


def polycom(*words: object) -> str:
    command = [sys.executable, "-m", "polycom_ext.cli", *map(str, words)]
    finished = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mirror")
    corpus("shakespeare", folder / "text")
    plays = [json.loads(line)["text"] for line in (folder / "text/train.jsonl").open()][:12]
    texts = [play[start : start + DOCUMENT] for play in plays for start in range(0, len(play), DOCUMENT)]
    (folder / "tokenizer.json").write_bytes(train(texts, 1024))
    stand_in.build(folder / "hosts", texts, folder / "tokenizer.json")
    return folder / "hosts"


@pytest.mark.long
@pytest.mark.parametrize(
    ("recipe", "form", "config", "section"),
    [
        ("redpajama-1t", "megatron", "dense-1b/table-1", "megatron"),
        ("olmoe-mix-0924", "megatron", "moe-1b-7b/megatron", "megatron"),
        ("olmoe-mix-0924", "olmo", "moe-1b-7b/olmo", "olmo"),
    ],
)
def test_a_config_trains_on_its_recipe(
    mirror: Path, tmp_path: Path, recipe: str, form: str, config: str, section: str
) -> None:
    data, output = tmp_path / "data", tmp_path / "run"
    polycom("data", "fetch", recipe, "--format", form, "--mirror", mirror, "--output", data, "--workers", 2)
    if form == "megatron":
        changes = {
            "per-split-data-args-path": data / "blend.json",
            **dict.fromkeys(("train-data-path", "valid-data-path"), "null"),
        }
    else:
        sets_of_table_2 = {
            f"{path.stem}-validation": [str(path)] for path in sorted((data / "validation").glob("*.npy"))
        }
        evaluator = {
            "label": "all-small-ppl-validation",
            "data": {"drop_last": True, "datasets": sets_of_table_2},
        }
        changes = {
            "data.paths": json.dumps([str(path) for path in sorted((data / "train").glob("*.npy"))]),
            "evaluators": json.dumps([evaluator]),
            "tokenizer.identifier": data / "tokenizer.json",
        }
    sets = [word for name, value in changes.items() for word in ("--set", f"{section}.{name}={value}")]
    polycom(
        *("run", f"configs/{config}.yaml", "--rehearse", "--set", "activation=polynorm", *sets),
        *("--output", output),
    )
    losses = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    assert len({row["step"] for row in losses}) > 1
