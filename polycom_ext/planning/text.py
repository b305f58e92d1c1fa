"""Plans as people read them: one run on a screen, its arithmetic, several runs side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from polycom_ext.planning.plan import PARTS, Line, Plan, by_part, total
from polycom_ext.planning.search import Choice
from polycom_ext.runs.layout import ACTIVATIONS

GIB = 2**30
RESERVE = 0.1
"""Of a device's memory, for what is not reckoned: workspaces, gradients of activations, buffers of
collectives, the driver, fragments. Our choice."""
MFU = 0.4
ORIGIN = "41 to 48 % are published of dense models on H100, see docs/planning.md; a mixture gets less"
"""Where MFU comes from."""


@dataclass(frozen=True)
class Device:
    """On which the run is to be."""

    name: str
    flops: float
    """FLOP/s at most."""
    memory: float
    """Bytes."""
    mfu: float

    @property
    def limit(self) -> float:
        """Bytes that a plan may fill."""
        return (1 - RESERVE) * self.memory


def block(
    plan: Plan, device: Device, choice: Choice | None, rows: Iterable[tuple[int, Choice | None]]
) -> str:
    """One run, a line a fact; `choice` is the smallest layout that fits where the run's own does not."""
    lines = [f"{plan.spec.name}: {plan.gpus} x {device.name}, {plan.layout.shape}"]
    facts = [*_facts(plan, device), *(("note", note) for note in plan.layout.notes)]
    if plan.spec.rehearsal_of is not None:
        lines = [f"{plan.spec.name}: {plan.gpus} processes, {plan.layout.shape}"]
        return "\n".join([*lines, *(f"  {name:13}{text}" for name, text in facts)])
    facts += [("WARNING", text) for text in _warnings(plan, device, choice)]
    batch = f"at {plan.layout.batch:,} sequences a step and the same MFU, within {_gib(device.limit)}"
    facts.append(("scaling", f"{batch}; * where that takes other settings"))
    lines += [f"  {name:13}{text}" for name, text in facts]
    return "\n".join([*lines, *(f"  {row}" for row in columns(list(_scaling(device, rows))))])


def _facts(plan: Plan, device: Device) -> Iterator[tuple[str, str]]:
    everything, active = total(plan.parameters), total(plan.active)
    met = "" if active == everything else f", of which a token meets {active:,} ({_short(active)})"
    yield "parameters", f"{everything:,} ({_short(everything)}){met}"
    layout = plan.layout
    steps = "" if plan.steps is None else f"{plan.steps:,} steps, {_short(plan.tokens or 0)} tokens: "
    micro = f"{layout.micro_batches} micro-batch{'es' if layout.micro_batches > 1 else ''} a replica"
    yield "training", f"{steps}{layout.batch:,} sequences of {layout.sequence:,} a step, {micro}"
    in_all = "" if plan.flops is None else f", {plan.flops:.3g} in all"
    yield "compute", f"{plan.flops_per_token / 1e9:.4g} GFLOP a token{in_all}"
    hours = plan.gpu_hours(device.mfu * device.flops)
    if hours is not None and plan.spec.rehearsal_of is None:
        rate = f"an MFU of {device.mfu:.0%} of {device.flops / 1e12:.0f} TFLOP/s"
        yield "time", f"{hours:,.0f} GPU-hours, {hours / plan.gpus / 24:.3g} days, at {rate}"
    sums = by_part(plan.memory)
    parts = ", ".join(f"{part} {_gib(sums[part])}" for part in PARTS if part in sums)
    of = "" if plan.spec.rehearsal_of is not None else f" of {_gib(device.memory)}"
    yield "memory", f"{_gib(plan.bytes)}{of} on {plan.stage.title}: {parts}"
    kept = plan.spec.keep_checkpoints
    saved, weights = total(plan.checkpoint), by_part(plan.checkpoint).get("weights", 0)
    several = "" if kept is None else f"; {kept} are kept, {_gib(kept * saved)}"
    yield "checkpoint", f"{_gib(saved)}, weights alone {_gib(weights)}{several}"
    sent = ", ".join(f"{kind} {_gib(size)}" for kind, size in by_part(plan.traffic).items())
    yield "sends a step", sent or "nothing"
    if plan.layout.bubble:
        yield "pipeline", f"idles {float(plan.layout.bubble):.1%} of the time that it works"


def _warnings(plan: Plan, device: Device, choice: Choice | None) -> Iterator[str]:
    if plan.bytes <= device.limit:
        return
    yield (
        f"does not fit: {_gib(plan.bytes)} is more than {_gib(device.limit)}, {device.name}'s "
        f"{_gib(device.memory)} but for {RESERVE:.0%} for what is not reckoned"
    )
    if choice is None:
        yield f"no layout on {plan.gpus} of them fits: take more, or such with more memory"
    else:
        settings = " ".join(f"--set {change}" for change in choice.changes)
        found = f"{choice.plan.layout.shape}, {_gib(choice.plan.bytes)}"
        yield f"the smallest layout that fits, {found}: {settings}"


def _scaling(device: Device, rows: Iterable[tuple[int, Choice | None]]) -> Iterator[tuple[str, ...]]:
    yield "GPUs", "micro-batches", "idle", "memory", "sends a step", "days", "layout"
    for gpus, choice in rows:
        if choice is None:
            yield str(gpus), *"-" * 5, "none that fits and shares the batch"
            continue
        there = choice.plan
        hours = there.gpu_hours(device.mfu * device.flops)
        days = "-" if hours is None else f"{hours / gpus / 24 * (1 + float(there.layout.bubble)):.3g}"
        yield (
            f"{gpus}{'*' if choice.changes else ''}",
            str(there.layout.micro_batches),
            f"{float(there.layout.bubble):.0%}",
            _gib(there.bytes),
            _gib(total(there.traffic)),
            days,
            there.layout.shape,
        )


def explained(plan: Plan) -> str:
    """The arithmetic: a line a term."""
    layout = plan.layout
    parts: list[tuple[str, Sequence[Line], str]] = [
        ("parameters", plan.parameters, ""),
        ("of which a token meets", plan.active, ""),
    ]
    for part, size in by_part(plan.memory).items():
        lines: Sequence[Line] = [line for line in plan.memory if line.part == part]
        parts.append((f"memory, {part}, on {plan.stage.title}", lines, _gib(size)))
    parts.append(("checkpoint", plan.checkpoint, _gib(total(plan.checkpoint))))
    for kind in by_part(plan.traffic):
        lines = [line for line in plan.traffic if line.part == kind]
        parts.append((f"sent in a step, {kind}", lines, _gib(total(lines))))
    said = []
    for title, lines, summed in parts:
        rows = [(f"  {line.title}", f"{line.value:,}", f"= {line.formula}") for line in lines]
        rows.append(("  in all", f"{total(lines):,}", f"= {summed}" if summed else ""))
        said += [f"{title}:", *columns(rows, right=(1,))]
    matrices = plan.flops_per_token / 6 - layout.layers * layout.attention_width * layout.sequence
    attention = f"{layout.layers} layers · {layout.attention_width:,} of q · {layout.sequence:,} tokens"
    said.append(
        f"FLOPs a token: 6 · ({matrices:,.0f} of matrices + {attention}) = {plan.flops_per_token:,.0f}"
    )
    return "\n".join(said)


def table(plans: Sequence[Plan], device: Device) -> str:
    """Several runs, a row each."""
    rows: list[tuple[str, ...]] = [
        (
            *("run", "parameters", "active", "GFLOP/token", "tokens", "GPUs"),
            *("memory", "model", "activations", "checkpoint", "sends a step", "days"),
        )
    ]
    warned = []
    for plan in plans:
        sums, hours = by_part(plan.memory), plan.gpu_hours(device.mfu * device.flops)
        fits = plan.bytes <= device.limit
        if not fits:
            warned.append(plan.spec.name)
        rows.append(
            (
                plan.spec.name,
                _short(total(plan.parameters)),
                _short(total(plan.active)),
                f"{plan.flops_per_token / 1e9:.4g}",
                "-" if plan.tokens is None else _short(plan.tokens),
                str(plan.gpus),
                f"{_gib(plan.bytes)}{'' if fits else ' !'}",
                _gib(plan.bytes - sums[ACTIVATIONS]),
                _gib(sums[ACTIVATIONS]),
                _gib(total(plan.checkpoint)),
                _gib(total(plan.traffic)),
                "-" if hours is None else f"{hours / plan.gpus / 24:.3g}",
            )
        )
    lines = columns(rows)
    if warned:
        lines.append(
            f"! more than {_gib(device.limit)}: plan it alone, and the smallest layout that fits is named"
        )
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] | None = None) -> list[str]:
    """Rows with their cells below each other; numbers to the right, all but the first and the last column."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    to_right = range(1, len(widths) - 1) if right is None else right
    return [
        "  ".join(
            cell.rjust(width) if n in to_right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _gib(size: float) -> str:
    """`13.9 GiB`, three digits."""
    for unit, bytes_ in (("TiB", 2**40), ("GiB", GIB), ("MiB", 2**20)):
        if size >= 0.9995 * bytes_ or unit == "MiB":
            number = size / bytes_
            return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
    raise AssertionError


def _short(number: float) -> str:
    """`1.35B`, `250B`, `2.05M`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.0f}"
