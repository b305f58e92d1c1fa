"""How Megatron lays a run out: the model over the ranks, what they keep and send, and what else could be."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from polycom_ext.integrations.megatron import kept, messages
from polycom_ext.integrations.megatron.native import FLAGS
from polycom_ext.integrations.megatron.sizes import Sizes
from polycom_ext.runs import layout
from polycom_ext.runs.layout import Factor, Held, Layout, Stage, State, Weight, product

RECOMPUTED = ("core_attn", "mlp_act", "moe_act", "layernorm", "mlp", "moe", "shared_experts")


def lay_out(sizes: Sizes) -> Layout:
    """Raises PolycomError for what is not reckoned."""
    kinds, ranks = sizes.stages(), sizes.pipeline
    in_flight = layout.pipeline_in_flight(ranks, sizes.chunks, sizes.micro_batches)
    stages = []
    for index, of_stage in enumerate(kinds):
        stage = Stage(
            f"pipeline stage {index + 1} of {ranks}" if ranks > 1 else "every rank",
            tuple(_weights(sizes, index, of_stage)),
            tuple(_held(sizes, index, of_stage, in_flight[index])),
        )
        stages.append(replace(stage, messages=messages.of_stage(sizes, index, of_stage, stage)))
    work = sizes.micro_batches * sizes.chunks
    return Layout(
        shape=_shape(sizes),
        sequence=sizes.sequence,
        batch=sizes.batch,
        micro_batches=sizes.micro_batches,
        replicas=sizes.replicas * sizes.context,
        expert_replicas=sizes.expert_replicas,
        stages=tuple(stages),
        states=tuple(_states(sizes)),
        layers=sizes.count("num-layers"),
        attention_width=sizes.block.queries,
        bubble=Fraction(ranks - 1, work) if work else Fraction(0),
        notes=tuple(_notes(sizes)),
    )


def _shape(sizes: Sizes) -> str:
    named = {
        "TP": sizes.tensor,
        "CP": sizes.context,
        "PP": sizes.pipeline,
        "EP": sizes.expert,
        "DP": sizes.replicas,
    }
    parts = [f"{name} {size}" for name, size in named.items() if size > 1 or name == "DP"]
    if sizes.sequence_parallel:
        parts.insert(1, "SP")
    if sizes.chunks > 1:
        parts.append(f"{sizes.chunks} chunks a stage")
    if sizes.expert_tensor != sizes.tensor and sizes.block.experts:
        parts.append(f"ETP {sizes.expert_tensor}")
    if sizes.recomputed_whole:
        parts.append("all recomputed")
    elif named_parts := [name for name in RECOMPUTED if sizes.recomputes(name)]:
        parts.append(f"{', '.join(named_parts)} recomputed")
    return " · ".join(parts)


def _weights(sizes: Sizes, index: int, kinds: Sequence[bool]) -> Iterator[tuple[int, Weight]]:
    block, stored, split = sizes.block, sizes.stored, (sizes.tensor, "tensor ranks")
    first, last = index == 0, index == sizes.pipeline - 1
    tied = not sizes["untie-embeddings-and-output-weights"]
    if first:
        yield 1, layout.table("embedding", sizes.vocabulary, block.hidden, stored, split, multiplied=tied)
        if sizes["position-embedding-type"] == "learned_absolute":
            positions = sizes.count("max-position-embeddings")
            yield 1, layout.table("positions", positions, block.hidden, stored)
    layers, mixtures = len(kinds), kinds.count(True)
    norms = product((2, "norms"), (sizes.norm, "vectors"), (block.hidden, "hidden"))
    of_heads = product((2, "norms"), (sizes.norm, "vectors"), (sizes.head, "of a head"))
    yield layers, layout.attention(block, stored, split)
    yield layers, Weight("norms", norms, stored)
    if sizes["qk-layernorm"]:
        yield layers, Weight("norms of q and k", of_heads, stored)
    if sizes.biases or sizes["add-qkv-bias"]:
        rows = product((block.queries + 2 * block.keys, "rows of q, k, v"))
        yield layers, Weight("biases of q, k, v", rows, stored, split)
    if sizes.biases:
        yield layers, Weight("biases after attention", product((block.hidden, "hidden")), stored)
    dense = replace(block, width=sizes.dense_width)
    for count, part in (
        (layers - mixtures, _ffn(sizes, dense)),
        (mixtures, _mixture(sizes) if mixtures else ()),
    ):
        for weight in part if count else ():
            yield count, weight
    if last:
        final = product((sizes.norm, "vectors"), (block.hidden, "hidden"))
        yield 1, Weight("last norm", final, stored)
        if not tied or not first:
            table = layout.table("output layer", sizes.vocabulary, block.hidden, stored, split, again=tied)
            yield 1, replace(table, multiplied=not tied)


def _ffn(sizes: Sizes, block: layout.Block, title: str = "FFN") -> Iterator[Weight]:
    split = (sizes.tensor, "tensor ranks")
    yield replace(layout.ffn(block, sizes.stored, split), title=title)
    if sizes.biases:
        wide = product((block.matrices - 1, "first matrices"), (block.width, "width"))
        yield Weight(f"biases of {title}", wide, sizes.stored, split)
        yield Weight(f"biases after {title}", product((block.hidden, "hidden")), sizes.stored)
    if block.coefficients:
        yield layout.coefficients(block)


def _mixture(sizes: Sizes) -> Iterator[Weight]:
    block, stored = sizes.block, sizes.stored
    split = (sizes.expert * sizes.expert_tensor, "expert ranks")
    yield from layout.experts(block, stored, split)
    active = Fraction(block.chosen, block.experts)
    if sizes.biases:
        wide = product(
            (block.experts, "experts"), (block.matrices - 1, "first matrices"), (block.width, "width")
        )
        yield Weight("biases of experts", wide, stored, split, True, active)
        after = product((block.experts, "experts"), (block.hidden, "hidden"))
        yield Weight("biases after experts", after, stored, (sizes.expert, "expert ranks"), True, active)
    if block.coefficients:
        yield layout.coefficients(block)
    if block.shared:
        yield from _ffn(sizes, replace(block, width=block.shared), "shared expert")
        if sizes["moe-shared-expert-gate"]:
            yield Weight("gate of the shared expert", product((block.hidden, "hidden")), stored)


def _held(sizes: Sizes, index: int, kinds: Sequence[bool], in_flight: int) -> Iterator[tuple[Factor, Held]]:
    """In flight are chunks, of the stage's layers each an equal part; ends are there once a micro-batch."""
    micro_batches = min(sizes.micro_batches, -(-in_flight // sizes.chunks))
    once = (micro_batches, "in flight")
    if index == 0:
        yield from ((once, one) for one in kept.first(sizes))
    yield from ((once, one) for one in kept.every_stage(sizes))
    for mixture in (False, True):
        count = kinds.count(mixture)
        alive = -(-count * in_flight // sizes.chunks)
        recomputed = 0
        if sizes.recomputed_whole:
            recomputed = _recomputed(sizes, alive)
            unit = sizes["recompute-num-layers"] or 1 if sizes["recompute-method"] != "block" else 1
            if recomputed:
                yield (-(-recomputed // unit), "recomputed layers in flight"), kept.boundary(sizes)
                for one in kept.layer(sizes, mixture):
                    yield (min(unit, count), "recomputed now"), one
        if alive > recomputed:
            for one in kept.layer(sizes, mixture):
                yield (alive - recomputed, "layers in flight"), one
    if index == sizes.pipeline - 1:
        yield from (((1, ""), one) for one in kept.last(sizes))


def _recomputed(sizes: Sizes, alive: int) -> int:
    """Of so many layers in flight those that are recomputed: all, or the first of each chunk."""
    if sizes["recompute-method"] != "block":
        return alive
    of_chunk = sizes.count("num-layers") // (sizes.pipeline * sizes.chunks)
    return -(-alive * min(of_chunk, sizes["recompute-num-layers"] or 1) // max(1, of_chunk))


def _states(sizes: Sizes) -> Iterator[State]:
    """float32 weights need no master copy. `stored` of a 16-bit model may be 4: coefficients."""
    sharded = bool(sizes["use-distributed-optimizer"])
    yield State("weights", "weights", {2: 2, 4: 4}, saved=True)
    yield State("gradients", "accumulated gradients", {2: sizes.gradient, 4: 4})
    yield State("optimizer", "float32 master weights", {2: 4, 4: 0}, sharded, saved=True)
    yield State("optimizer", "Adam's two moments", {2: 8, 4: 8}, sharded, saved=True)


def _notes(sizes: Sizes) -> Iterator[str]:
    if sizes.block.experts:
        yield "experts are taken to get equally many tokens; the rank whose experts are chosen most has more"
    if not sizes.local:
        yield "activations are reckoned from Transformer Engine's and FlashAttention 2's code, not measured"


LAYERS_ELSEWHERE = (
    *("num-layers-per-virtual-pipeline-stage", "num-virtual-stages-per-pipeline-rank"),
    *("decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers", "recompute-activations"),
)
"""Options that an alternative leaves out."""


def alternatives(sizes: Sizes, possible: Callable[[dict[str, Any]], bool]) -> Iterator[tuple[str, ...]]:
    """Divisions of the work by powers of two, micro-batches and recomputation, the cheapest first.

    Tensor parallelism stays within a node; virtual stages and uneven pipelines are left out.
    `possible` says whether a run with these options can be.
    """
    spec, block = sizes.spec, sizes.block
    tensors = [n for n in _powers(spec.processes_per_node) if sizes.groups % n == 0 and block.width % n == 0]
    pipelines = [n for n in _powers(spec.world_size) if sizes.count("num-layers") % n == 0]
    experts = [n for n in _powers(spec.world_size) if block.experts % n == 0] if block.experts else [1]
    micro = [n for n in _powers(sizes.micro) if sizes.micro % n == 0]
    again = [name for name in ("none", "activation", "all") if name != "activation" or _discards(sizes)]
    found = [
        (t * p, again.index(r), -m, abs(e - sizes.expert), p, _options(sizes, t, p, e, m, r))
        for t, p, e, m, r in itertools.product(tensors, pipelines, experts, micro, again)
    ]
    for *_, chosen in sorted(found, key=lambda one: one[:-1]):
        if possible(chosen):
            yield tuple(
                f"megatron.{name}={_written(value)}"
                for name, value in chosen.items()
                if value != spec.options.get(name)
            )


def _discards(sizes: Sizes) -> bool:
    """Whether the activation's result can be dropped and formed again."""
    own = sizes.spec.entry.name in FLAGS
    return bool(sizes["moe-grouped-gemm"]) if sizes.block.experts else not own


def _options(sizes: Sizes, tensor: int, pipeline: int, expert: int, micro: int, again: str) -> dict[str, Any]:
    """A value of None takes an option out of the spec."""
    module = "moe_act" if sizes.block.experts else "mlp_act"
    recompute = {
        "none": (None, None, None, None),
        "activation": ("selective", [module], None, None),
        "all": ("full", None, "uniform", 1),
    }[again]
    names = ("recompute-granularity", "recompute-modules", "recompute-method", "recompute-num-layers")
    given = sizes.spec.options
    return {
        **({name: None for name in LAYERS_ELSEWHERE if given.get(name) is not None}),
        "tensor-model-parallel-size": _unless(1, tensor, given.get("tensor-model-parallel-size")),
        "sequence-parallel": True if tensor > 1 else given.get("sequence-parallel"),
        "pipeline-model-parallel-size": _unless(1, pipeline, given.get("pipeline-model-parallel-size")),
        "expert-model-parallel-size": _unless(1, expert, given.get("expert-model-parallel-size")),
        "micro-batch-size": micro,
        **dict(zip(names, recompute, strict=True)),
    }


def _unless(default: int, value: int, given: Any) -> Any:
    """The value; None where it is the default and the spec does not speak of it."""
    return None if value == default and given is None else value


def _written(value: Any) -> str:
    """As YAML has it."""
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return "null" if value is None else str(value).lower()


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(most.bit_length()) if 1 << n <= most]
