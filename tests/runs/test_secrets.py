"""A secret of the spec's environment reaches the trainer and stands in no file."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from polycom_ext.cli import main
from polycom_ext.runs.secrets import is_secret, masked

RUN = Path("outputs/small")


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("WANDB_API_KEY", "x", True),
        ("AWS_SECRET_ACCESS_KEY", "x", True),
        ("hf_token", "x", True),
        ("PGPASSWORD", "x", True),
        ("REDIS_AUTH", "x", True),
        ("HTTPS_PROXY", "http://me:hunter2@proxy:3128", True),
        ("HTTPS_PROXY", "http://proxy:3128", False),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("SSH_AUTH_SOCK", "/tmp/agent", False),
        ("OMP_NUM_THREADS", "1", False),
        ("PWD", "/tmp", False),
    ],
)
def test_a_secret_is_known_by_its_name_or_by_the_login_in_it(name: str, value: str, secret: bool) -> None:
    assert is_secret(name, value) is secret
    assert masked({name: value}) == {name: f"${{{name}}}" if secret else value}


def test_a_run_keeps_no_secret_and_its_command_asks_for_it(
    toy_spec: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TOY_API_KEY", raising=False)
    spec = Path(toy_spec(steps=1, talk="hello"))
    content = yaml.safe_load(spec.read_text())
    content["environment"]["TOY_API_KEY"] = "hunter2"
    spec.write_text(yaml.safe_dump(content))
    assert main(["run", str(spec), "--dry-run"]) == 0
    assert main(["run", str(spec)]) == 0
    assert "the key is 7 long" in (RUN / "log.txt").read_text()
    for path in RUN.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes()
    assert "hunter2" not in "".join(capfd.readouterr())

    command = [RUN / "command.sh"]
    (RUN / "checkpoints" / "step").unlink()
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "TOY_API_KEY: is kept in no record" in refused.stderr
    again = ["run", str(RUN / "run.yaml"), "--output", str(RUN)]
    assert main(again) == 2
    assert "environment.TOY_API_KEY is to be taken from your environment" in capfd.readouterr().err

    monkeypatch.setenv("TOY_API_KEY", "hunter22")
    subprocess.run(command, capture_output=True, check=True)
    assert main(again) == 0
    assert "already complete" in capfd.readouterr().out
