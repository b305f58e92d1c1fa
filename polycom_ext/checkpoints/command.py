"""`polycom convert SOURCE TARGET --to FORM`: a checkpoint in another form, on a CPU, a shard at a time."""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from polycom_ext import arguments, trainers
from polycom_ext.checkpoints import manifest
from polycom_ext.checkpoints.forms import Options, Ranks, Reads, Writes, WritesByRank
from polycom_ext.checkpoints.model import Model, checked
from polycom_ext.checkpoints.upgrade import upgraded
from polycom_ext.data.progress import progress
from polycom_ext.errors import PolycomError, did_you_mean
from polycom_ext.files import exclusive

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a run's directory, or a checkpoint")
    parser.add_argument(
        "target", metavar="TARGET", type=arguments.output, help="a folder that does not exist"
    )
    parser.add_argument(
        "--to", required=True, metavar="FORM", help=f"the form to write: {', '.join(_writers())}"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: as they are); coefficients stay float32"
    )
    parser.add_argument(
        "--activation",
        metavar="NAME",
        help="a larger family of the model's activation, for the same function to go on from: "
        "polyrelu for ReLU and ReLU², a higher order for a polynomial",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json to go with it")
    parser.add_argument(
        "--shard-bytes",
        type=arguments.count,
        default=Options.shard_bytes,
        metavar="N",
        help=f"size of a file of weights, what has to fit in memory (default: {Options.shard_bytes})",
    )
    for kind in asdict(Ranks()):
        parser.add_argument(
            f"--{kind}-parallel",
            type=arguments.count,
            default=1,
            metavar="N",
            help=f"ranks of {kind} parallelism, for the forms of a file a rank: {', '.join(_by_rank())}",
        )


def main(args: argparse.Namespace) -> int:
    """Convert, and say what of what."""
    ranks = Ranks(args.tensor_parallel, args.pipeline_parallel, args.expert_parallel)
    options = Options(args.dtype, args.shard_bytes, args.tokenizer, ranks)
    model = convert(args.source, args.target, args.to, options, args.activation)
    print(f"{args.target}: {model.config['activation']['name']} of {model.source}")
    return 0


def convert(
    source: Path | Model, target: Path, to: str, options: Options, activation: str | None = None
) -> Model:
    """Write a checkpoint, a run's newest, or one that is open, in the form `to`.

    The target appears whole or not at all.

    With an `activation`, of which the model's is a member, it is written as one of it (`upgrade.py`).

    Returns the model, of which `source` says which checkpoint it was. Raises PolycomError for a target that
    exists, and as what reads and writes.
    """
    writer = _writer(to)
    if options.ranks != Ranks() and to not in _by_rank():
        raise PolycomError(
            f"--to {to} is read in any layout of ranks: --tensor-parallel, --pipeline-parallel and "
            f"--expert-parallel are for {', '.join(_by_rank())}"
        )
    if target.exists():
        raise PolycomError(f"{target} exists, and nothing is written over: name another folder")
    if options.tokenizer is not None and not options.tokenizer.is_file():
        raise PolycomError(f"--tokenizer {options.tokenizer} does not exist")
    model = source if isinstance(source, Model) else opened(source)
    model = checked(model if activation is None else upgraded(model, activation))
    if options.tokenizer is not None:
        from polycom_ext.data.tokenizer import vocabulary  # needs tokenizers, which others can do without

        vocabulary(options.tokenizer, model.config["vocab_size"])
    partial = target.with_name(f".{target.name}.partial")
    with exclusive(partial):
        try:
            _write(writer, model, partial / "made", options)
            (partial / "made").rename(target)
        finally:
            shutil.rmtree(partial)
    return model


def _writer(name: str) -> Writes:
    forms = _writers()
    if name not in forms:
        raise PolycomError(f"--to {name}{did_you_mean(name, forms)}: the forms are {', '.join(forms)}")
    return forms[name]


def _writers() -> dict[str, Writes]:
    return {name: form for name, form in trainers.checkpoint_forms().items() if isinstance(form, Writes)}


def _by_rank() -> list[str]:
    return [name for name, form in _writers().items() if isinstance(form, WritesByRank)]


def opened(source: Path) -> Model:
    """The model of a checkpoint, or of the newest of a run.

    Raises PolycomError where there is none, or weights that were converted are no longer what they were.
    """
    if not source.is_dir():
        raise PolycomError(f"{source} is no folder, so no checkpoint")
    readers = [form for form in trainers.checkpoint_forms().values() if isinstance(form, Reads)]
    for form in readers:
        found = form.find(source)
        if found is not None:
            for damaged in found.passed_over:
                print(f"passed over: {damaged}", file=sys.stderr)
            model = form.read(found.path)
            for folder in (source, source.absolute().parent):  # some forms are a folder of what was converted
                manifest.compare(folder)
            return model
    raise PolycomError(f"{source} holds no checkpoint that can be read here")


def _write(writer: Writes, model: Model, folder: Path, options: Options) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a conversion that was interrupted
    folder.mkdir()
    with progress(len(model.tensors), "converting", "tensors") as bar:
        writer.write(model, folder, options, lambda size: bar.update(1))
    manifest.write(folder, model.source)
