"""What a trainer's adapter tells the rest of the house: the one contract between a run and an upstream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from polycom_ext import trainers, upstream
from polycom_ext.runs.spec import Spec


@dataclass(frozen=True)
class Upstream:
    """A pinned version of a trainer."""

    title: str
    """As reports name it."""
    trees: tuple[str, ...]
    """Trees of patches/pins.toml that go on PYTHONPATH, the first one first."""


@dataclass(frozen=True)
class Facts:
    """Model, batch and data of one run. None where the spec does not say (upstream's default holds then)."""

    layers: int | None
    hidden: int | None
    heads: int | None
    experts: int
    """Routed experts a block; 0 for a dense model."""
    active_experts: int | None
    sequence: int | None
    """Tokens in a sequence."""
    batch: int | None
    """Sequences in a global batch."""
    ffn_width: int | None
    """Ungated width, per expert where there are experts."""
    data: tuple[str, ...]
    """Token files, or what stands for them."""
    seed: int | None = None
    """Of initial weights and data order."""

    @property
    def kind(self) -> str:
        """`moe` or `dense`."""
        return "moe" if self.experts else "dense"

    def tokens(self, steps: int) -> int | None:
        """Tokens seen in that many steps."""
        return None if self.sequence is None or self.batch is None else steps * self.batch * self.sequence


@dataclass(frozen=True)
class Needs:
    """What a run needs of a machine beside this package, its extra of the trainer's name, and the trees."""

    gpu: str = ""
    """Why it runs on GPUs only, a clause; nothing where it is rehearsed on a CPU."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """Modules of other projects that it imports -> why, a clause."""
    on_gpu: Mapping[str, str] = field(default_factory=dict)
    """Those that it imports only where it runs on GPUs."""


@dataclass(frozen=True)
class StandIn:
    """Token files for rehearsals, in place of a corpus: real text in a vocabulary that is small."""

    folder: Path
    vocabulary: int
    """Tokens, of which the last one ends a document."""

    @property
    def train(self) -> str:
        """Prefix of the training set."""
        return str(self.folder / "train")

    @property
    def valid(self) -> str:
        """Prefix of the validation set."""
        return str(self.folder / "valid")

    @property
    def tokenizer(self) -> str:
        """File of the tokenizer."""
        return f"{self.train}.tokenizer.json"


class Adapter(Protocol):
    """One trainer. A run is `torchrun … arguments(spec, run_dir)`.

    A worker that will not run says why by `runs.entry.refuse`, and exits with status 2.
    """

    name: str
    """What `trainer` is in a spec."""
    section: str
    """The spec's section of upstream's own options."""
    seed: str
    """The option in it that is `Facts.seed`; nothing where there is none."""
    upstreams: Mapping[str, Upstream]
    """What `upstream` may be in a spec -> the pinned version, the default first; empty if none is pinned."""
    token_format: str
    """The form of token files that it reads, as `polycom data prepare --format` calls it."""

    def needs_patches(self, spec: Spec) -> bool:
        """Whether the run needs its trees patched: not for an activation that upstream has itself."""

    def validate(self, spec: Spec) -> None:
        """Raise PolycomError, before anything starts, for what this trainer could not run.

        Called with the upstream trees in place, except for a dry run, which downloads nothing.
        """

    def check_inputs(self, spec: Spec) -> None:
        """Raise PolycomError for an input file that is not there; asked before a start, not for a dry run."""

    def needs(self, spec: Spec) -> Needs:
        """For `polycom doctor`, which looks whether it is there."""

    def arguments(self, spec: Spec, run_dir: Path) -> list[str]:
        """What follows torchrun's own options: `-m MODULE …`, or a script."""

    def environment(self, spec: Spec, run_dir: Path) -> dict[str, str]:
        """Variables that every run of this trainer needs; the spec's own `environment` wins."""

    def files(self, spec: Spec, run_dir: Path) -> dict[str, str]:
        """Name -> text of the files that `arguments` points to: what is too long for a command line.

        They are written into the run directory before each start, beside run.yaml.
        """

    def model(self, spec: Spec) -> dict[str, Any]:
        """The part of the spec that fixes the model, by dotted keys: a checkpoint fits no other values."""

    def facts(self, spec: Spec) -> Facts:
        """Model, batch and data under the names that all trainers share."""

    def total_steps(self, spec: Spec) -> int | None:
        """The step at which the run is over; None if that is not counted in steps."""

    def latest_step(self, spec: Spec, run_dir: Path) -> int | None:
        """The step of the newest whole checkpoint, from which the run would go on; None if there is none.

        Raises PolycomError where there are some and none is whole: what is damaged is not absent.
        """

    def checkpoints(self, spec: Spec, run_dir: Path) -> list[tuple[int, Path]]:
        """(step, folder) of all that are whole, up to `latest_step`'s: those that may be removed."""

    def prepare_resume(self, spec: Spec, run_dir: Path) -> list[str]:
        """Before a start: have the trainer go on from `latest_step`, and move aside what is damaged.

        Returns a sentence for each checkpoint that is passed over; `runs.checkpoints` tells which are whole.
        """

    def is_complete(self, spec: Spec, run_dir: Path) -> bool:
        """Whether the checkpoint of the last step has been written."""

    def coefficients(self, spec: Spec, run_dir: Path) -> dict[str, Any] | None:
        """What a complete run has learned, for coefficients.json; None if its entry writes the file."""

    def rehearsal(self, spec: Spec, data: StandIn, on_gpus: bool) -> dict[str, Any]:
        """Changes, by dotted keys as `--set` has them, that make of the run its rehearsal; None deletes.

        Kept are kinds, proportions and the layout, but for copies of the model; `runs/shrinking.py` has the
        arithmetic. `on_gpus`: kernels and back end stay; else they are those of a CPU. An adapter whose runs
        have no rehearsal leaves out this method and `token_format`.

        Raises PolycomError for what a rehearsal could not keep.
        """


def find(name: str) -> Adapter:
    """The adapter of `trainer: NAME`; raises PolycomError for a name that has none."""
    adapter: Adapter = trainers.find(name)
    return adapter


def chosen(adapter: Adapter, spec: Spec) -> Upstream | None:
    """The pinned version that the spec names, or the adapter's first; None where nothing is pinned."""
    name = spec.upstream or next(iter(adapter.upstreams), None)
    return None if name is None else adapter.upstreams[name]


def trees(adapter: Adapter, spec: Spec) -> tuple[str, ...]:
    """Names of the trees that the run has on PYTHONPATH."""
    version = chosen(adapter, spec)
    return version.trees if version else ()


def chosen_tree(adapter: Adapter, spec: Spec) -> Path:
    """Where the trainer itself is, or will be: the first of `trees`."""
    return upstream.tree(trees(adapter, spec)[0])


def integer(value: Any) -> int | None:
    """A value of a spec, if it is an integer."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
