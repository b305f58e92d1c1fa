"""A run that is told to stop saves where it is; what goes on from there is the straight run."""

from pathlib import Path

import pytest

from .conftest import Trainer
from .test_layouts import MOE_MODEL

EVERY_RUN = "--polycom-activation polynorm --exit-signal-handler --exit-signal SIGUSR1".split()
"""As the adapter starts it."""
EP2 = (2, [*MOE_MODEL, "--expert-model-parallel-size", "2", "--use-distributed-optimizer"])
BESIDE = "--async-save --async-strategy mcore --use-persistent-ckpt-worker".split()


@pytest.mark.full
@pytest.mark.parametrize(
    ("processes", "layout", "saving"),
    [
        (*EP2, []),
        (2, ["--use-distributed-optimizer"], BESIDE),
    ],
    ids=["MoE, EP2", "DP2, written beside training"],
)
def test_a_stop_of_one_rank_has_all_save_and_resume_as_if_nothing_had_been(
    train: Trainer, tmp_path: Path, processes: int, layout: list[str], saving: list[str]
) -> None:
    options = [*EVERY_RUN, *layout, *saving]
    folder = ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "1000"]
    straight = train(*EVERY_RUN, *layout, processes=processes, iterations=8)
    stopped = train(*options, *folder, processes=processes, iterations=8, stop_when="iteration        2/")
    at = max(stopped.metrics)
    assert 2 <= at < 8
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(at)
    resumed = train(*options, *folder, processes=processes, iterations=8)
    assert min(resumed.metrics) == at + 1
    for name in ("train/loss", "train/grad_norm"):
        assert {**stopped.series(name), **resumed.series(name)} == straight.series(name)
