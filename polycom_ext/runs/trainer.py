"""What a trainer must tell the rest of the room, and where each one lives."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

from polycom_ext.errors import PolycomError
from polycom_ext.runs.spec import Spec
from polycom_ext.runs.suggest import did_you_mean


class Trainer(Protocol):
    """One upstream's adapter. A run is `python -m torch.distributed.run … arguments(spec, run_dir)`."""

    name: str
    """As in `trainer:` of a spec; the spec's section of trainer options has the same name."""
    upstreams: tuple[str, ...]
    """Upstreams of patches/pins.toml that go on PYTHONPATH, the first one first."""

    def validate(self, spec: Spec) -> None:
        """Raise PolycomError, before anything starts, for what this trainer could not run.

        Called with the upstream trees in place, except for a dry run, which downloads nothing.
        """

    def check_inputs(self, spec: Spec) -> None:
        """Raise PolycomError for an input file that is not there; asked before a start, not for a dry run."""

    def arguments(self, spec: Spec, run_dir: Path) -> list[str]:
        """What follows `python -m torch.distributed.run … --nproc-per-node N`."""

    def environment(self, spec: Spec, run_dir: Path) -> dict[str, str]:
        """Variables that every run of this trainer needs; the spec's own `environment` wins."""

    def files(self, spec: Spec, run_dir: Path) -> dict[str, str]:
        """Name -> text of the files that `arguments` points to: what is too long for a command line.

        They are written into the run directory before each start, beside run.yaml.
        """

    def model(self, spec: Spec) -> dict[str, Any]:
        """The part of the spec that fixes the model, by dotted keys: a checkpoint fits no other values."""

    def total_steps(self, spec: Spec) -> int | None:
        """The step at which the run is over; None if that is not counted in steps."""

    def latest_step(self, spec: Spec, run_dir: Path) -> int | None:
        """The step of the checkpoint from which the run would go on; None if there is none.

        Raises PolycomError where this cannot be told: what cannot be read is not absent.
        """

    def is_complete(self, spec: Spec, run_dir: Path) -> bool:
        """Whether the checkpoint of the last step has been written."""

    def coefficients(self, spec: Spec, run_dir: Path) -> dict[str, Any] | None:
        """What a complete run has learned, for coefficients.json; None if its entry writes the file."""


TRAINERS = {
    "megatron": ("polycom_ext.runs.megatron", "MegatronTrainer"),
    "olmo": ("polycom_ext.runs.olmo", "OLMoTrainer"),
    "olmo-moe": ("polycom_ext.runs.olmo", "OLMoMoETrainer"),
}
"""`trainer:` of a spec -> the module and class of its adapter, imported when a spec asks for it."""


def find(name: str) -> Trainer:
    """The adapter for `trainer: NAME`; raises PolycomError for a name that has none."""
    if name not in TRAINERS:
        raise PolycomError(
            f"unknown trainer {name!r}{did_you_mean(name, TRAINERS)}; known: {', '.join(TRAINERS)}"
        )
    module, cls = TRAINERS[name]
    trainer: Trainer = getattr(importlib.import_module(module), cls)()
    return trainer
