"""What `polycom plan` says of OLMo's models is what these keep, and upstream's defaults are its own."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polycom_ext import upstream
from polycom_ext.integrations.olmo import layout
from polycom_ext.planning.plan import by_part, plan
from polycom_ext.runs.layout import ACTIVATIONS
from polycom_ext.runs.spec import load

TOP = Path(__file__).parents[2]
SECTIONS = {"model": "ModelConfig", "fsdp": "FSDPConfig", "ddp": "DDPConfig", "": "TrainConfig"}


@pytest.mark.long
@pytest.mark.parametrize("activation", ["polynorm", "swiglu"])
@pytest.mark.parametrize("base", ["olmo-base-dense", "olmo-base-moe"])
def test_a_micro_batch_keeps_what_is_planned(base: str, activation: str, tmp_path: Path) -> None:
    config = TOP / "configs" / "tiny" / f"{base}.yaml"
    changes = ["name=measured", "processes_per_node=1", f"activation={activation}"]
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("olmo_kept.py"))]
    tree = upstream.ensure_applied("olmo")
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{TOP}", "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path), str(config), *changes]
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    planned = by_part(plan(load(config, changes)).memory)[ACTIVATIONS]
    assert planned == pytest.approx(int(done.stdout.splitlines()[-1]), rel=5e-3)


def test_upstreams_defaults_are_those_of_the_plan() -> None:
    source = (upstream.ensure_applied("olmo") / "olmo" / "config.py").read_text()
    classes = {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)}

    def default(name: str) -> Any:
        section, _, field = name.rpartition(".")
        for line in classes[SECTIONS[section]].body:
            if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == field:
                value = line.value
                assert value is not None
                return value.attr if isinstance(value, ast.Attribute) else ast.literal_eval(value)
        raise AssertionError(name)

    assert {name: default(name) for name in layout.DEFAULTS} == layout.DEFAULTS
