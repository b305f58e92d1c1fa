"""A run that is told to stop saves where it is; what goes on from there is the straight run."""

from __future__ import annotations

from typing import Any

import pytest

from polycom_ext.integrations.olmo.adapter import OLMoAdapter
from polycom_ext.runs.spec import Spec

from .conftest import Trainer
from .test_training import DDP2, FSDP2, POLYNORM, UNSHARDED

LONG: dict[str, Any] = {"max_duration": 12, "scheduler": {"t_max": 12}, "model": POLYNORM}
RARELY = {"save_interval": 1000}
STEP_2 = "[step=2/"


def assert_stops_and_resumes(train: Trainer, settings: dict[str, Any]) -> None:
    straight = train(**LONG, **settings)
    stopped = train(**LONG, **settings, stop_when=STEP_2)
    at = max(stopped.metrics)
    assert 2 <= at < 12
    assert [path.name for path in (stopped.folder / "checkpoints").glob("step*")] != []
    resumed = train(**LONG, **settings, folder=stopped.folder)
    assert f"checkpoints/step{at}" in resumed.log.partition("Loading ")[2].splitlines()[0]
    for name in ("train/loss", "train/grad_norm"):
        assert resumed.series(name) == straight.series(name)
    assert resumed.coefficients == straight.coefficients


@pytest.mark.full
@pytest.mark.parametrize(
    "settings",
    [
        FSDP2 | RARELY | {"moe": True},
        pytest.param(
            DDP2 | RARELY | {"save_interval": None, "save_interval_unsharded": 1000}, marks=pytest.mark.long
        ),
        pytest.param(FSDP2 | UNSHARDED | {"save_interval_unsharded": 1000}, marks=pytest.mark.long),
    ],
    ids=["MoE, FSDP", "dense, DDP", "dense, FSDP, unsharded"],
)
def test_a_stop_of_one_rank_has_all_save_and_resume_as_if_nothing_had_been(
    train: Trainer, settings: dict[str, Any]
) -> None:
    assert_stops_and_resumes(train, settings)


@pytest.mark.full
def test_so_it_is_on_the_branch(train_branch: Trainer) -> None:
    assert_stops_and_resumes(train_branch, FSDP2 | RARELY | {"moe": True})


@pytest.mark.full
@pytest.mark.long
def test_what_upstreams_time_limit_leaves_is_whole_not_complete_and_gone_on_from(train: Trainer) -> None:
    """OLMo saves at the limit, and trains a few steps more."""
    settings = LONG | FSDP2 | RARELY
    limit: dict[str, Any] = {"time_limit": 0.01, "canceled_check_interval": 1, "extra_steps_after_cancel": 2}
    ended = train(**settings, **limit)
    spec = Spec("tiny", "olmo", "polynorm", None, 2, {}, {"max_duration": 12})
    assert (OLMoAdapter().latest_step(spec, ended.folder), max(ended.metrics)) == (1, 3)
    assert not OLMoAdapter().is_complete(spec, ended.folder)
    resumed = train(**settings, folder=ended.folder)
    assert OLMoAdapter().is_complete(spec, ended.folder)
    assert resumed.series("train/loss") == train(**settings).series("train/loss")
