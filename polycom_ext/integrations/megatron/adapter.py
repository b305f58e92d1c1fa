"""Megatron-LM's adapter: `megatron:` in a spec holds upstream's own long options without the dashes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from polycom_ext import activations
from polycom_ext.errors import PolycomError, did_you_mean
from polycom_ext.integrations.megatron import blends, checks, layout, miniature, model, options, saved, tokens
from polycom_ext.integrations.megatron.native import FLAGS, PATCHED
from polycom_ext.integrations.megatron.sizes import Sizes
from polycom_ext.runs import entry
from polycom_ext.runs.adapter import Facts, Needs, StandIn, Upstream, chosen_tree, integer
from polycom_ext.runs.layout import Layout
from polycom_ext.runs.record import Record
from polycom_ext.runs.spec import Spec

RESERVED = {
    "save": "checkpoints go to the run directory",
    "load": "a run resumes from its own directory; to start from elsewhere use pretrained-checkpoint",
    "polycom-activation": "name it with `activation:`",
    "polycom-metrics": "metrics go to the run directory",
    "exit-signal-handler": "a run saves a checkpoint whenever it is told to stop",
    "exit-signal": "stop a run by SIGTERM or SIGUSR1 to `polycom node`",
    "yaml-cfg": "it would replace every option of the run",
    **{option: "name the activation with `activation:`" for flags in FLAGS.values() for option in flags},
}
"""Options that a run sets itself -> why a spec cannot."""


class MegatronAdapter:
    """Runs `polycom_ext.integrations.megatron.pretrain` on Megatron-LM's own training loop."""

    name = section = "megatron"
    seed = "seed"
    upstreams: Mapping[str, Upstream] = {"megatron": Upstream("Megatron-LM", ("megatron",))}
    token_format = "megatron"

    def needs_patches(self, spec: Spec) -> bool:
        return spec.entry.name not in FLAGS or any(map(spec.options.get, PATCHED))

    def validate(self, spec: Spec) -> None:
        _check_reserved(spec)
        tree = chosen_tree(self, spec)
        if tree.exists():
            _check_options(spec, options.known(tree))
        blends.check(spec.name, spec.options)
        checks.check(spec, _resolved(spec))

    def check_inputs(self, spec: Spec) -> None:
        checks.check_packages(spec)
        tokens.check(spec)

    def needs(self, spec: Spec) -> Needs:
        return checks.needs(spec)

    def arguments(self, spec: Spec, run_dir: Path) -> list[str]:
        record = Record(run_dir)
        given = {
            "log-timers-to-tensorboard": True,  # of steps; a spec may say false
            **blends.arguments(_resolved(spec), run_dir),
            "save": str(record.checkpoints),
            "load": str(record.checkpoints),
            "polycom-metrics": str(record.metrics),
            "exit-signal-handler": True,
            "exit-signal": entry.STOP.name,
        }
        arguments = ["-m", "polycom_ext.integrations.megatron.pretrain"]
        for name, value in given.items():
            if value is True:
                arguments.append(f"--{name}")
            elif isinstance(value, list):
                arguments += [f"--{name}", *map(_word, value)]
            elif value is not False:  # one that begins with a dash must not be taken for an option
                word = _word(value)
                arguments += [f"--{name}={word}"] if word.startswith("-") else [f"--{name}", word]
        return arguments

    def environment(self, spec: Spec, run_dir: Path) -> dict[str, str]:
        return {}

    def files(self, spec: Spec, run_dir: Path) -> dict[str, str]:
        written = blends.files(spec.options).values()
        return {name: text for file in written for name, text in file.items()}

    def model(self, spec: Spec) -> dict[str, Any]:
        """Without Megatron's tree, which only a dry run does without, the activation alone."""
        entry, order = activations.parse(spec.activation)
        tree = chosen_tree(self, spec)
        given = {name: value for name, value in _resolved(spec).items() if name not in RESERVED}
        fixed = model.fixed(given, options.known(tree)) if tree.exists() else {}
        return {"activation": (entry.name, order), **{f"megatron.{name}": fixed[name] for name in fixed}}

    def facts(self, spec: Spec) -> Facts:
        given = spec.options
        experts = integer(given.get("num-experts")) or 0
        return Facts(
            layers=integer(given.get("num-layers")),
            hidden=integer(given.get("hidden-size")),
            heads=integer(given.get("num-attention-heads")),
            experts=experts,
            active_experts=integer(given.get("moe-router-topk")) if experts else None,
            sequence=integer(given.get("seq-length")),
            batch=integer(given.get("global-batch-size")),
            ffn_width=spec.ffn_width,
            data=("mock data",) if given.get("mock-data") else tuple(blends.training(given)),
            seed=integer(given.get(self.seed)),
        )

    def total_steps(self, spec: Spec) -> int | None:
        return checks.integer(spec, "train-iters", None)

    def latest_step(self, spec: Spec, run_dir: Path) -> int | None:
        return saved.choice(spec, Record(run_dir).checkpoints).step

    def checkpoints(self, spec: Spec, run_dir: Path) -> list[tuple[int, Path]]:
        return saved.whole(spec, Record(run_dir).checkpoints)

    def prepare_resume(self, spec: Spec, run_dir: Path) -> list[str]:
        return saved.prepare(spec, Record(run_dir).checkpoints)

    def is_complete(self, spec: Spec, run_dir: Path) -> bool:
        latest, total = self.latest_step(spec, run_dir), self.total_steps(spec)
        return latest is not None and total is not None and latest >= total

    def layout(self, spec: Spec) -> Layout:
        checks.check(spec, _resolved(spec))
        return layout.lay_out(Sizes(spec, _resolved(spec)))

    def alternatives(self, spec: Spec) -> Iterator[tuple[str, ...]]:
        def possible(changes: dict[str, Any]) -> bool:
            other = replace(spec, options={**spec.options, **changes})
            kept = {name: value for name, value in other.options.items() if value is not None}
            try:
                checks.check(replace(other, options=kept), _resolved(replace(other, options=kept)))
            except PolycomError:
                return False
            return True

        return layout.alternatives(Sizes(spec, _resolved(spec)), possible)

    def coefficients(self, spec: Spec, run_dir: Path) -> dict[str, Any] | None:
        from polycom_ext.integrations.megatron.coefficients import (
            from_megatron,  # with torch, which reads them
        )

        return from_megatron(Record(run_dir).checkpoints, spec.activation)

    def rehearsal(self, spec: Spec, data: StandIn, on_gpus: bool) -> dict[str, Any]:
        return miniature.changes(spec, data, on_gpus)


def _resolved(spec: Spec) -> dict[str, Any]:
    """The spec's options with the activation and the widths in upstream's terms."""
    given = dict(spec.options)
    given.update(FLAGS.get(spec.entry.name, {"polycom-activation": spec.activation}))
    width = spec.matched_ffn_width
    if width is not None:
        given["ffn-hidden-size"] = width
        if given.get("num-experts"):
            given["moe-ffn-hidden-size"] = width
    return given


def _word(value: Any) -> str:
    """As written, but for what Python's own parsers write without the dot of YAML's `.inf`."""
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else str(value)


def _check_reserved(spec: Spec) -> None:
    for name in spec.options:
        if name in RESERVED:
            raise PolycomError(f"{spec.name}: megatron.{name} cannot be set: {RESERVED[name]}")
    if spec.ffn_width is not None:
        for name in ("ffn-hidden-size", "moe-ffn-hidden-size"):
            if name in spec.options:
                raise PolycomError(f"{spec.name}: give either ffn_width or megatron.{name}, not both")


def _check_options(spec: Spec, known: dict[str, options.Option]) -> None:
    for name, value in spec.options.items():
        option = known.get(name)
        if option is None:
            near = did_you_mean(name, known)
            raise PolycomError(f"{spec.name}: Megatron has no option megatron.{name}{near}")
        problem = option.problem(value)
        if problem:
            raise PolycomError(f"{spec.name}: megatron.{name} {problem}")
