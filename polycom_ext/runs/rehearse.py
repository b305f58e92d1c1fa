"""`polycom run SPEC… --rehearse`: each run in a form that a machine of two cores trains in seconds.

What a rehearsal keeps and what it shrinks is said by the trainer's adapter, in the arithmetic of
`runs/shrinking.py`, as changes that one could have given by `--set`. Here they are applied: what is set or
compared beside them, such as a parallel size, comes first, so that the sizes follow it; what they change too,
such as a number of steps, comes after them.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from polycom_ext import files, shipped
from polycom_ext.errors import PolycomError, needing
from polycom_ext.runs import document, fields
from polycom_ext.runs import spec as specs
from polycom_ext.runs.adapter import StandIn, find
from polycom_ext.runs.spec import Spec

FOLDER = Path("build/rehearsal")
"""Where the token files of rehearsals are, one folder a form."""
CORPUS = "shakespeare"
DOCUMENTS = 8
"""Of the corpus, to train on: enough, and made in seconds."""
VOCABULARY = 1024
SUFFIX = "-rehearsal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of every verb that takes a spec."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--rehearse",
        action="store_true",
        help="each run in small, as NAME-rehearsal: layout, kinds and proportions stay, sizes shrink, and "
        "what a CPU lacks is replaced; --set wins over it",
    )
    how.add_argument(
        "--rehearse-on-gpus", action="store_true", help="the same with kernels and back end of the spec"
    )


def loader(args: argparse.Namespace) -> Callable[..., list[Spec]]:
    """What reads specs as `specs.load_each` does: that, or `load_each` of rehearsals, as the flags say."""
    if args.rehearse or args.rehearse_on_gpus:
        return partial(load_each, on_gpus=args.rehearse_on_gpus)
    return specs.load_each


def load_each(
    path: Path, overrides: Iterable[str] = (), each: Iterable[str] = (), *, on_gpus: bool = False
) -> list[Spec]:
    """The rehearsals of the runs that `specs.load_each` finds.

    Raises PolycomError as that one, and for a trainer or a run that has no rehearsal.
    """
    return [
        _rehearsal(mapping, changes, str(path), on_gpus)
        for mapping, changes in specs.choices(path, overrides, each)
    ]


def _rehearsal(mapping: dict[str, Any], changes: list[specs.Change], origin: str, on_gpus: bool) -> Spec:
    shrunk = _smaller(specs.from_mapping(specs.changed(mapping, changes), origin), on_gpus)
    late = [change for change in changes if any(_overlap(change[0], key) for key in shrunk)]
    kept = specs.changed(mapping, [change for change in changes if change not in late])
    run = specs.from_mapping(kept, origin)
    names: list[specs.Change] = [("name", run.name + SUFFIX), ("rehearsal_of", run.name)]
    return specs.from_mapping(specs.changed(kept, [*_smaller(run, on_gpus).items(), *late, *names]), origin)


def _smaller(spec: Spec, on_gpus: bool) -> dict[str, Any]:
    adapter = find(spec.trainer)
    if spec.rehearsal_of is not None:
        raise PolycomError(
            f"{spec.name} is a rehearsal already, of {spec.rehearsal_of}: run it without --rehearse"
        )
    if not hasattr(adapter, "rehearsal"):
        raise PolycomError(
            f"{spec.name}: trainer {spec.trainer} does not say how a run of it is made small (`rehearsal` of "
            "its adapter), so --rehearse is not for it"
        )
    return adapter.rehearsal(spec, stand_in(adapter.token_format), on_gpus)


def _overlap(one: str, other: str) -> bool:
    """Whether two dotted keys are one, or one is in the other's section."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def on_a_cpu(trainer: str) -> dict[str, Any]:
    """What configs/cpu has for a trainer, as changes by dotted keys."""
    path = shipped.folder("configs") / "cpu" / f"{trainer}.yaml"
    return document.flat(fields.read(path, "run spec"))


def stand_in(token_format: str) -> StandIn:
    """The token files of that form, which `make_data` makes."""
    return StandIn(FOLDER / token_format, VOCABULARY)


def has_data(spec: Spec) -> bool:
    """Whether the token files are there that `make_data` would make for the spec."""
    if spec.rehearsal_of is None:
        return True
    data = stand_in(find(spec.trainer).token_format)
    return all(Path(f"{prefix}.json").is_file() for prefix in (data.train, data.valid))


def make_data(chosen: Iterable[Spec]) -> None:
    """Make the token files of the rehearsals among the specs, where they are not there yet.

    Raises PolycomError as `polycom data corpus` and `prepare` do.
    """
    for spec in chosen:
        if not has_data(spec):
            token_format = find(spec.trainer).token_format
            data = stand_in(token_format)
            print(f"{data.folder}: token files for rehearsals are made, once", flush=True)
            _make(token_format, data)


def _make(token_format: str, data: StandIn) -> None:
    with needing("token files need", "data"):
        from polycom_ext.data.corpora import corpus
        from polycom_ext.data.prepare import prepare
        from polycom_ext.data.settings import Settings
    text = FOLDER / "text"
    corpus(CORPUS, text)
    some = text / "some.jsonl"
    with (text / "train.jsonl").open("rb") as lines:
        files.write_text(some, b"".join(itertools.islice(lines, DOCUMENTS)).decode())
    prepare(Settings([some], Path(data.train), token_format, train_tokenizer=VOCABULARY))
    prepare(Settings([text / "valid.jsonl"], Path(data.valid), token_format, tokenizer=Path(data.tokenizer)))
