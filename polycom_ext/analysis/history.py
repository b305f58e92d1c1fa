"""What a run's activations had learned at each of its checkpoints; no other tensor of these is read."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from polycom_ext.analysis.learned import activation, learned
from polycom_ext.checkpoints.command import opened
from polycom_ext.errors import PolycomError
from polycom_ext.runs import plan
from polycom_ext.runs.record import Record


@dataclass(frozen=True)
class Moment:
    """One checkpoint."""

    step: int
    layers: list[dict[str, float]]
    """Of each layer, {title of a coefficient: its value}."""


def over_training(path: Path) -> list[Moment]:
    """Of the whole checkpoints of a run's directory, by step; nothing where there are not two, or no run.

    What cannot be read, or is removed meanwhile, is passed over, with a sentence to stderr.
    """
    if not Record(path).spec.is_file():
        return []
    try:
        run = plan.recorded(path)
        folders = dict(sorted(run.adapter.checkpoints(run.spec, path)))
    except PolycomError as error:
        print(f"{path.name}: its earlier checkpoints are not looked at: {error}", file=sys.stderr)
        return []
    if len(folders) < 2:
        return []
    moments = []
    for step, folder in folders.items():
        try:
            model = opened(folder)
            module = activation(model)
            layers = [learned(model, module, index) for index in range(model.config["num_hidden_layers"])]
        except PolycomError as error:
            print(f"passed over: {error}", file=sys.stderr)
            continue
        if any(layers):
            moments.append(Moment(step, layers))
    return moments if len(moments) > 1 else []
