"""What a run puts on its devices, as its trainer's adapter lays it out: `polycom plan` adds it up.

Every number is a `Product`, which shows how it comes about. A trainer's room knows its upstream's options and
what that allocates; nothing of it is known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

from polycom_ext.errors import PolycomError
from polycom_ext.runs.spec import Spec

Factor = tuple[int, str]
"""A number and what it is of."""
BYTES = "bytes"
ACTIVATIONS = "activations"
"""The part of memory that grows with the micro-batch, not with the model alone."""


@dataclass(frozen=True)
class Product:
    """A product of named numbers, divided by others."""

    times: tuple[Factor, ...]
    over: tuple[Factor, ...] = ()

    @property
    def exact(self) -> Fraction:
        """Its value."""
        return Fraction(math.prod(n for n, _ in self.times), math.prod(n for n, _ in self.over))

    @property
    def value(self) -> int:
        """Its value, what is not whole rounded up."""
        return math.ceil(self.exact)

    def __truediv__(self, factor: Factor) -> Product:
        return Product(self.times, (*self.over, factor))

    def __str__(self) -> str:
        """`24 layers · 2,048 hidden / 2 tensor ranks`, without what is 1."""
        times = [shown(factor) for factor in self.times if factor[0] != 1]
        over = [f" / {shown(factor)}" for factor in self.over if factor[0] != 1]
        return " · ".join(times or [shown(factor) for factor in self.times[:1]]) + "".join(over)


def product(*times: Factor | int, over: tuple[Factor, ...] = ()) -> Product:
    """The product of these; a number alone has no name."""
    return Product(tuple((n, "") if isinstance(n, int) else n for n in times), over)


def shown(factor: Factor) -> str:
    """`2,048 hidden`"""
    return f"{factor[0]:,} {factor[1]}".rstrip()


@dataclass(frozen=True)
class Weight:
    """Parameters of one kind, of one layer or of what stands once in a stage."""

    title: str
    count: Product
    """Of all ranks that share them, together."""
    stored: int
    """Bytes of one in the model."""
    split: Factor = (1, "")
    """The ranks of a stage that have a part of them each."""
    expert: bool = False
    """Replicated over fewer ranks than the others, those of expert-data parallelism."""
    active: Fraction = Fraction(1)
    """The share that a token meets."""
    multiplied: bool = False
    """Matrices that tokens are multiplied with, which takes `efficiency.model_flops`."""
    again: bool = False
    """A second copy, for another stage, of what is counted already."""

    @property
    def held(self) -> Product:
        """Those of one rank."""
        return self.count / self.split


@dataclass(frozen=True)
class Held:
    """What a rank holds beside what `State` says, of one micro-batch and one layer (or once)."""

    title: str
    size: Product
    """Bytes on one rank."""
    part: str = ACTIVATIONS


@dataclass(frozen=True)
class State:
    """What is kept for each parameter."""

    part: str
    title: str
    size: Mapping[int, int]
    """Bytes a parameter, by the bytes of one in the model."""
    sharded: bool = False
    """Each replica keeps a part."""
    saved: bool = False
    """Is in a checkpoint that training can go on from."""


@dataclass(frozen=True)
class Message:
    """What one rank sends in a step."""

    kind: str
    """`data parallel`, `tensor parallel`, …"""
    title: str
    size: Product
    """Bytes."""


@dataclass(frozen=True)
class Stage:
    """What one rank of a pipeline stage has: the stages are those of all ranks that differ."""

    title: str
    weights: tuple[tuple[int, Weight], ...]
    """How many of them, and what."""
    held: tuple[tuple[Factor, Held], ...]
    """How many of them are alive at once at most, and what."""
    messages: tuple[Message, ...] = ()

    def parameters(self, expert: bool, stored: int) -> int:
        """Those of one rank that are experts' or not, and of so many bytes."""
        return sum(
            times * weight.held.value
            for times, weight in self.weights
            if weight.expert is expert and weight.stored == stored
        )


@dataclass(frozen=True)
class Layout:
    """One run, laid out."""

    shape: str
    """How the ranks share the work, in a few words."""
    sequence: int
    """Tokens in a sequence."""
    batch: int
    """Sequences in a global batch."""
    micro_batches: int
    """That one replica takes in a step."""
    replicas: int
    """Ranks that hold the same parameters, or the same part of them."""
    expert_replicas: int
    """The same of experts'."""
    stages: tuple[Stage, ...]
    states: tuple[State, ...]
    layers: int
    attention_width: int
    """Heads times head size, as `efficiency.model_flops` wants it."""
    bubble: Fraction = Fraction(0)
    """Time that a pipeline idles, as a share of the time that it works."""
    notes: tuple[str, ...] = ()
    """What a reader must know of what was reckoned, a sentence each."""

    @property
    def tokens(self) -> int:
        """In a step."""
        return self.sequence * self.batch


@runtime_checkable
class LaysOut(Protocol):
    """An adapter whose runs can be planned: what it has beside the contract of `runs/adapter.py`."""

    def layout(self, spec: Spec) -> Layout:
        """Lay the run out, by closed formulas, without its upstream.

        Raises PolycomError for an option whose effect is not known, and for a batch or a size that the spec
        does not give.
        """

    def alternatives(self, spec: Spec) -> Iterator[tuple[str, ...]]:
        """Other ways to lay the same training out on as many ranks, as values of `--set`.

        The ones that cost least come first: fewer ranks that share a replica, less that is computed twice.
        """


def of(adapter: Any, spec: Spec) -> LaysOut:
    """The adapter; raises PolycomError where it is one whose runs cannot be planned."""
    if not isinstance(adapter, LaysOut):
        raise PolycomError(
            f"{spec.name}: trainer {spec.trainer!r} does not say how it lays a run out, so it cannot be "
            "planned; its adapter would need `layout` and `alternatives` of runs/layout.py"
        )
    return adapter


@dataclass(frozen=True)
class Block:
    """A transformer's sizes, under names that all trainers share."""

    hidden: int
    queries: int
    """Heads times head size."""
    keys: int
    """The same of keys, and of values."""
    width: int
    """Of the FFN, or of one expert."""
    matrices: int
    """Of an FFN: 3 where it is gated, else 2."""
    coefficients: int
    """Of the activation."""
    experts: int = 0
    chosen: int = 0
    shared: int = 0
    """Width of the expert that every token passes."""


def attention(block: Block, stored: int, split: Factor = (1, "")) -> Weight:
    """The four matrices of an attention layer."""
    rows = 2 * block.queries + 2 * block.keys
    named = product((rows, "rows of q, k, v, o"), (block.hidden, "hidden"))
    return Weight("attention", named, stored, split, multiplied=True)


def ffn(block: Block, stored: int, split: Factor = (1, "")) -> Weight:
    """The matrices of a dense FFN."""
    size = product((block.matrices, "matrices"), (block.hidden, "hidden"), (block.width, "width"))
    return Weight("FFN", size, stored, split, multiplied=True)


def experts(block: Block, stored: int, split: Factor = (1, ""), expert: bool = True) -> Iterator[Weight]:
    """Router, routed experts and shared expert of a mixture."""
    router = product((block.experts, "experts"), (block.hidden, "hidden"))
    yield Weight("router", router, stored)
    matrices = ((block.matrices, "matrices"), (block.hidden, "hidden"))
    each = product((block.experts, "experts"), *matrices, (block.width, "width"))
    active = Fraction(block.chosen, block.experts)
    yield Weight("experts", each, stored, split, expert, active, multiplied=True)


def coefficients(block: Block, stored: int = 4) -> Weight:
    """Of one activation."""
    return Weight("coefficients", product((block.coefficients, "of an activation")), stored)


def table(title: str, rows: int, hidden: int, stored: int, split: Factor = (1, ""), **more: Any) -> Weight:
    """An embedding, or an output layer."""
    return Weight(title, product((rows, "rows"), (hidden, "hidden")), stored, split, **more)


def pipeline_in_flight(stages: int, chunks: int, micro_batches: int) -> list[int]:
    """Chunks of layers whose activations each stage holds at most under 1F1B, interleaved for chunks > 1.

    Stage i of P warms up with P - i - 1 micro-batches, interleaved with 2 (P - i - 1) + (V - 1) P chunks, and
    holds one more (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
    """
    most = micro_batches * chunks
    if chunks == 1:
        return [min(stages - i, most) for i in range(stages)]
    return [min(2 * (stages - i - 1) + (chunks - 1) * stages + 1, most) for i in range(stages)]


def all_reduce(size: Product, ranks: Factor) -> Product:
    """Bytes that a rank sends where a ring reduces so many: twice (n - 1) / n of them."""
    return Product((*size.times, (2, ""), (ranks[0] - 1, "others")), (*size.over, ranks))


def gather(size: Product, ranks: Factor) -> Product:
    """Bytes that a rank sends where so many, of all together, are gathered, or reduced and scattered."""
    return Product((*size.times, (ranks[0] - 1, "others")), (*size.over, ranks))
