"""A run's layout, added up: every number with the lines of arithmetic that it comes from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from polycom_ext.runs.adapter import Adapter, find
from polycom_ext.runs.efficiency import model_flops
from polycom_ext.runs.layout import Layout, Stage, Weight, of
from polycom_ext.runs.spec import Spec

PARTS = ("weights", "gradients", "optimizer", "gathered", "activations")
"""The parts of memory, in the order in which they are shown."""


@dataclass(frozen=True)
class Line:
    """One term of a sum: what it is of, what it is, and how it comes about."""

    part: str
    title: str
    formula: str
    value: int


@dataclass(frozen=True)
class Plan:
    """What one run needs. Bytes are of the rank that has the most."""

    spec: Spec
    layout: Layout
    steps: int | None
    parameters: tuple[Line, ...]
    """Of the whole model."""
    active: tuple[Line, ...]
    """Those that a token meets."""
    flops_per_token: float
    memory: tuple[Line, ...]
    stage: Stage
    """Where that rank is."""
    checkpoint: tuple[Line, ...]
    """What training goes on from, of all ranks together."""
    traffic: tuple[Line, ...]
    """Sent in a step by the rank that sends most."""

    @property
    def tokens(self) -> int | None:
        """In all."""
        return None if self.steps is None else self.steps * self.layout.tokens

    @property
    def flops(self) -> float | None:
        """In all."""
        return None if self.tokens is None else self.tokens * self.flops_per_token

    @property
    def gpus(self) -> int:
        """Or processes, where it is rehearsed on a CPU."""
        return self.spec.world_size

    @property
    def bytes(self) -> int:
        """Of memory."""
        return total(self.memory)

    def gpu_hours(self, flops_per_second: float) -> float | None:
        """At a speed of each device."""
        return None if self.flops is None else self.flops / flops_per_second / 3600


def total(lines: Iterable[Line]) -> int:
    """The sum of their values."""
    return sum(line.value for line in lines)


def by_part(lines: Iterable[Line]) -> dict[str, int]:
    """Part -> sum, in the lines' order."""
    sums: dict[str, int] = {}
    for line in lines:
        sums[line.part] = sums.get(line.part, 0) + line.value
    return sums


def plan(spec: Spec, adapter: Adapter | None = None) -> Plan:
    """By the adapter of the spec's trainer. Raises PolycomError where that cannot lay the run out."""
    adapter = adapter or find(spec.trainer)
    layout = of(adapter, spec).layout(spec)
    of_stages = [(tuple(_memory(layout, stage)), stage) for stage in layout.stages]
    memory, fullest = max(of_stages, key=lambda one: total(one[0]))
    traffic = max((tuple(_traffic(stage)) for stage in layout.stages), key=total)
    weights = [(n, weight) for stage in layout.stages for n, weight in stage.weights if not weight.again]
    return Plan(
        spec=spec,
        layout=layout,
        steps=adapter.total_steps(spec),
        parameters=tuple(_counted(weights)),
        active=tuple(_counted(weights, active=True)),
        flops_per_token=_flops(layout),
        memory=memory,
        stage=fullest,
        checkpoint=tuple(_checkpoint(layout, weights)),
        traffic=traffic,
    )


def _merged(weights: Iterable[tuple[int, Weight]]) -> dict[Weight, int]:
    """Weights that are the same in several stages, and how many there are of them."""
    found: dict[Weight, int] = {}
    for count, weight in weights:
        found[weight] = found.get(weight, 0) + count
    return found


def _counted(weights: Iterable[tuple[int, Weight]], active: bool = False) -> Iterator[Line]:
    for weight, count in _merged(weights).items():
        share = weight.active if active else Fraction(1)
        formula = _times(count, "layers", str(weight.count))
        if share != 1:
            formula += f" · {share.numerator} / {share.denominator}"
        yield Line("parameters", weight.title, formula, int(count * weight.count.exact * share))


def _times(count: int, of_what: str, formula: str) -> str:
    return formula if count == 1 else f"{count} {of_what} · {formula}"


def _flops(layout: Layout) -> float:
    weights = sum(
        count * weight.count.exact * weight.active
        for stage in layout.stages
        for count, weight in stage.weights
        if weight.multiplied
    )
    return model_flops(float(weights), layout.layers, layout.attention_width, layout.sequence)


def _memory(layout: Layout, stage: Stage) -> Iterator[Line]:
    for state in layout.states:
        for expert, replicas in ((False, layout.replicas), (True, layout.expert_replicas)):
            for stored, each in state.size.items():
                count = stage.parameters(expert, stored)
                shards = replicas if state.sharded else 1
                if count and each:
                    whose = "experts' parameters" if expert else "parameters"
                    formula = f"{count:,} {whose} · {each} bytes" + (
                        f" / {shards} replicas" if shards > 1 else ""
                    )
                    yield Line(state.part, state.title, formula, math.ceil(Fraction(count * each, shards)))
    for (count, what), held in stage.held:
        formula = _times(count, what, str(held.size))
        yield Line(held.part, held.title, formula, math.ceil(count * held.size.exact))


def _traffic(stage: Stage) -> Iterator[Line]:
    for message in stage.messages:
        yield Line(message.kind, message.title, str(message.size), message.size.value)


def _checkpoint(layout: Layout, weights: Iterable[tuple[int, Weight]]) -> Iterator[Line]:
    weights = list(weights)
    for state in layout.states:
        if not state.saved:
            continue
        for stored, each in state.size.items():
            count = sum(n * weight.count.value for n, weight in weights if weight.stored == stored)
            if count and each:
                yield Line(state.part, state.title, f"{count:,} parameters · {each} bytes", count * each)
