"""A loss on a token file is the trainer's own validation loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
from polycom_ext.evaluation import tokens

from ...evaluation.token_files import written
from .conftest import CPU_OPTIONS, TINY, Trainer
from .test_conversion import converted

LENGTH, BATCH, BATCHES = 32, 4, 2


@pytest.mark.full
def test_a_loss_on_a_file_is_megatron_s_validation_loss(train: Trainer, tmp_path: Path) -> None:
    """After its last step it validates once, on each window of the file."""
    count = BATCHES * BATCH
    ids = np.random.default_rng(1).integers(0, 127, count * LENGTH + 1)
    file = written(tmp_path / "set", "megatron", ids)
    options = [one for one in TINY if one != "--mock-data"]
    for name, value in (("eval-iters", BATCHES), ("lr", 1e-2)):
        options[options.index(f"--{name}") + 1] = str(value)
    data = ("--train-data-path", str(file), "--valid-data-path", str(file))
    saving = ("--save", str(tmp_path / "run"), "--save-interval", "2", "--ckpt-format", "torch_dist")
    cache = ("--data-cache-path", str(tmp_path / "cache"), "--polycom-activation", "polynorm")
    run = train.exactly(*CPU_OPTIONS, *options, *data, *saving, *cache, iterations=2)
    assert not any(run.statuses), run.log[-3000:]
    losses = {name: values for metrics in run.metrics.values() for name, values in metrics.items()}
    [theirs] = [losses[name] for name in losses if name.startswith("valid/") and name.endswith("/loss")]
    model = converted(tmp_path / "run" / "iter_0000002", tmp_path / "hf")
    ours = tokens.measure(model, tokens.windows(file, LENGTH, 128), None, 4)
    assert ours["windows"] == count
    assert ours["loss"] == pytest.approx(theirs, rel=1e-6)
