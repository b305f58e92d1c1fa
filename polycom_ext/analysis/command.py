"""`polycom analyze CHECKPOINT …`: the paper's figures 6 and 7, coefficients, shapes and dead units."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from polycom_ext import arguments
from polycom_ext.errors import MissingDependencyError, PolycomError, needing
from polycom_ext.runs.record import Record

SEQUENCES, LENGTH = 4, 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="CHECKPOINT",
        help="a run's directory, of which the newest, a trainer's checkpoint, or a folder of Hugging Face",
    )
    parser.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="token files for what needs text: hidden states and units (default: weights alone)",
    )
    parser.add_argument(
        "--sequences", type=arguments.count, default=SEQUENCES, metavar="N", help=f"(default: {SEQUENCES})"
    )
    parser.add_argument(
        "--length",
        type=arguments.count,
        metavar="L",
        help=f"tokens in each (default: {LENGTH})",
    )
    parser.add_argument(
        "--output", type=arguments.output, default=Path("analysis"), metavar="DIR", help="(default: analysis)"
    )


def main(args: argparse.Namespace) -> int:
    """Write CSV files, figures and studies.json; a run keeps its study for `polycom report`."""
    with needing("figures need", "report"):
        from polycom_ext.analysis import plots, tables
        from polycom_ext.drawing import looks
    if args.output.exists() and not args.output.is_dir():
        raise PolycomError(f"the analysis cannot go to {args.output}: it is a file, not a folder")
    if args.tokens is not None and importlib.util.find_spec("transformers") is None:
        raise MissingDependencyError("--tokens needs transformers: pip install 'polycom-ext[eval]'")
    labels = _labels(args.sources)
    studies = [_studied(path, args) for path in args.sources]
    args.output.mkdir(parents=True, exist_ok=True)
    drawn = looks([study.activation for study in studies])
    tables.write(list(zip(labels, studies, strict=True)), args.output)
    studied = list(zip(labels, drawn, studies, strict=True))
    made = plots.draw(studied, args.output, "analysis")
    learned = plots.coefficients(studied, args.output / "analysis-coefficients.png")
    shapes = plots.shapes(studied, args.output / "analysis-shapes.png")
    told = {label: study.as_json() for label, study in zip(labels, studies, strict=True)}
    (args.output / "studies.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    for path, study in zip(args.sources, studies, strict=True):
        if Record(path).spec.is_file():
            Record(path).write_analysis(study.as_json())
    figures = ", ".join(plot.path.name for plot in (*made, learned, shapes) if plot)
    print(f"{args.output}: {figures}, and their numbers as CSV")
    return 0


def _labels(paths: list[Path]) -> list[str]:
    """The last part of each path that tells it from the others."""
    for parts in range(1, max(len(path.absolute().parts) for path in paths) + 1):
        labels = ["/".join(path.absolute().parts[-parts:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    raise PolycomError("a checkpoint is named twice")


def _studied(path: Path, args: argparse.Namespace) -> Any:
    from polycom_ext.analysis.history import over_training
    from polycom_ext.analysis.study import study
    from polycom_ext.checkpoints.command import opened
    from polycom_ext.checkpoints.model import checked
    from polycom_ext.data.progress import progress

    model = checked(opened(path))
    tokens = None if args.tokens is None else _tokens(model.config, args)
    history = over_training(path)
    layers = model.config["num_hidden_layers"]
    with progress(layers * (1 if tokens is None else 2), path.name, "layers") as bar:
        return study(model, tokens, lambda: bar.update(1), history)


def _tokens(config: dict[str, Any], args: argparse.Namespace) -> Any:
    import numpy as np
    import torch

    from polycom_ext.evaluation.tokens import windows

    length = args.length or min(LENGTH, config["max_position_embeddings"])
    cut = windows(args.tokens, length, config["vocab_size"], "--length")
    count = min(args.sequences, cut.count)
    return torch.from_numpy(np.stack([cut[index][:length] for index in range(count)]))
