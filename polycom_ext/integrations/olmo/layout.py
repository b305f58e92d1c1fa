"""How OLMo lays a run out: its model under FSDP or DDP, what a rank keeps and sends, and what else could be.

What a block keeps for backward was seen on a CPU, with 0.6.0; what megablocks' experts do was read in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from polycom_ext import activations
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.olmo.native import NATIVE
from polycom_ext.runs import layout
from polycom_ext.runs.layout import (
    BYTES,
    Block,
    Factor,
    Held,
    Layout,
    Message,
    Product,
    Stage,
    State,
    Weight,
    product,
)
from polycom_ext.runs.spec import Spec

DEFAULTS: dict[str, Any] = {
    "model.mlp_ratio": 4,
    "model.block_type": "sequential",
    "model.block_group_size": 1,
    "model.alibi": False,
    "model.rope": False,
    "model.flash_attention": False,
    "model.attention_layer_norm": False,
    "model.attention_layer_norm_with_affine": True,
    "model.residual_dropout": 0.1,
    "model.embedding_dropout": 0.1,
    "model.embedding_layer_norm": False,
    "model.layer_norm_type": "default",
    "model.layer_norm_with_affine": True,
    "model.include_bias": True,
    "model.weight_tying": True,
    "model.multi_query_attention": None,
    "model.n_kv_heads": None,
    "model.moe_shared_expert": False,
    "global_train_batch_size": 512,
    "device_train_microbatch_size": 16,
    "distributed_strategy": "fsdp",
    "activation_checkpointing": None,
    "fsdp.sharding_strategy": "FULL_SHARD",
    "fsdp.wrapping_strategy": None,
    "fsdp.precision": "pure",
    "fsdp.hybrid_sharding_num_model_replicas": None,
    "ddp.grad_sync_mode": "batch",
}
"""Upstream's defaults of what is read here."""
ONLY: dict[str, tuple[Any, ...]] = {
    "model.block_type": ("sequential", "moe"),
    "model.block_group_size": (1,),
    "model.alibi": (False,),
    "model.embedding_layer_norm": (False,),
    "fsdp.wrapping_strategy": ("by_block",),
    "distributed_strategy": ("fsdp", "ddp"),
    "fsdp.sharding_strategy": ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"),
}
"""Options of which only these values are reckoned."""
CHECKPOINTED = {
    None: Fraction(0),
    "whole_layer": Fraction(1),
    "one_in_two": Fraction(1, 2),
    "one_in_three": Fraction(1, 3),
    "one_in_four": Fraction(1, 4),
    "one_in_eight": Fraction(1, 8),
    "two_in_three": Fraction(2, 3),
    "three_in_four": Fraction(3, 4),
    "fine_grained": Fraction(0),
}
"""`activation_checkpointing` -> the share of the blocks that are recomputed as a whole."""


@dataclass(frozen=True)
class Sizes:
    """The spec's options, by dotted names that are upstream's."""

    spec: Spec
    given: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name, allowed in ONLY.items():
            unused = name.startswith("fsdp.") and self["distributed_strategy"] != "fsdp"
            if not unused and self[name] not in allowed:
                raise self._beyond(name, allowed)
        if self["activation_checkpointing"] not in CHECKPOINTED:
            raise self._beyond("activation_checkpointing", tuple(filter(None, CHECKPOINTED)))

    def _beyond(self, name: str, allowed: tuple[Any, ...]) -> PolycomError:
        known = ", ".join(map(str, allowed))
        what = f"olmo.{name} {self[name]}, but only {known}"
        return PolycomError(f"{self.spec.name}: `polycom plan` does not reckon {what}")

    def __getitem__(self, name: str) -> Any:
        value: Any = self.given
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return DEFAULTS.get(name) if value is None else value

    def count(self, name: str) -> int:
        """An option that must be there, a whole number."""
        value = self[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PolycomError(f"{self.spec.name}: a plan needs olmo.{name}, a whole number, not {value!r}")
        return value

    @property
    def fsdp(self) -> bool:
        return bool(self["distributed_strategy"] == "fsdp")

    @property
    def strategy(self) -> str:
        return str(self["fsdp.sharding_strategy"]) if self.fsdp else "NO_SHARD"

    @property
    def shards(self) -> int:
        """Ranks that hold a part of each parameter."""
        world = self.spec.world_size
        if self.strategy == "NO_SHARD":
            return 1
        if self.strategy == "HYBRID_SHARD":
            return world // (self["fsdp.hybrid_sharding_num_model_replicas"] or self.spec.nodes)
        return world

    @property
    def stored(self) -> int:
        """Bytes of an element as it is computed with; the weights at rest are float32."""
        return 4 if self["precision"] in (None, "fp32") else 2

    @property
    def reduced(self) -> int:
        """Bytes of a gradient as it is reduced."""
        return self.stored if self.fsdp and self["fsdp.precision"] == "pure" else 4

    @property
    def batch(self) -> int:
        return self.count("global_train_batch_size")

    @property
    def micro(self) -> int:
        return min(self.count("device_train_microbatch_size"), self.batch // self.spec.world_size)

    @property
    def micro_batches(self) -> int:
        return -(-self.batch // self.spec.world_size // self.micro)

    @property
    def sequence(self) -> int:
        return self.count("model.max_sequence_length")

    @property
    def vectors(self) -> int:
        """Of a norm: weights, and biases."""
        bias = self["model.bias_for_layer_norm"]
        bias = self["model.include_bias"] if bias is None else bias
        return 1 + bool(bias)

    @property
    def block(self) -> Block:
        hidden, heads = self.count("model.d_model"), self.count("model.n_heads")
        kv = self["model.n_kv_heads"] or (1 if self["model.multi_query_attention"] else heads)
        entry, order = activations.parse(self.spec.activation)
        mixture = self["model.block_type"] == "moe"
        width = self.spec.matched_ffn_width
        if width is None:
            first = self["model.mlp_hidden_size"] or self.count("model.mlp_ratio") * hidden
            width = first // 2 if entry.gated else first
        return Block(
            hidden=hidden,
            queries=hidden,
            keys=hidden // heads * kv,
            width=width,
            matrices=3 if entry.gated else 2,
            coefficients=entry.parameters(order),
            experts=self.count("model.moe_num_experts") if mixture else 0,
            chosen=self.count("model.moe_top_k") if mixture else 0,
            shared=width if mixture and self["model.moe_shared_expert"] else 0,
        )


def lay_out(sizes: Sizes) -> Layout:
    """Raises PolycomError for what is not reckoned."""
    world = sizes.spec.world_size
    if sizes.batch % world:
        raise PolycomError(
            f"{sizes.spec.name}: global_train_batch_size {sizes.batch} is not a multiple of {world} processes"
        )
    layers = sizes.count("model.n_layers")
    of_block, root = list(_of_block(sizes)), list(_root(sizes))
    weights = (*((1, one) for one in root), *((layers, one) for one in of_block))
    stage = Stage("every rank", weights, tuple(_held(sizes, layers, of_block, root)))
    return Layout(
        shape=_shape(sizes),
        sequence=sizes.sequence,
        batch=sizes.batch,
        micro_batches=sizes.micro_batches,
        replicas=sizes.shards,
        expert_replicas=sizes.shards,
        stages=(replace(stage, messages=tuple(_messages(sizes, layers, of_block, root))),),
        states=tuple(_states(sizes)),
        layers=layers,
        attention_width=sizes.block.queries,
        notes=tuple(_notes(sizes)),
    )


def _shape(sizes: Sizes) -> str:
    how = f"FSDP {sizes.strategy} over {sizes.shards}" if sizes.fsdp else f"DDP {sizes.spec.world_size}"
    again = sizes["activation_checkpointing"]
    micro = f"{sizes.micro} sequences a micro-batch"
    return " · ".join([how, micro, *([f"{again} recomputed"] if again else [])])


def _root(sizes: Sizes) -> Iterator[Weight]:
    hidden, tied = sizes.block.hidden, bool(sizes["model.weight_tying"])
    rows = sizes["model.embedding_size"] or sizes.count("model.vocab_size")
    yield layout.table("embedding", rows, hidden, 4, multiplied=tied)
    if not sizes["model.rope"]:
        yield layout.table("positions", sizes.sequence, hidden, 4)
    if sizes["model.layer_norm_with_affine"]:
        yield Weight("last norm", product((sizes.vectors, "vectors"), (hidden, "hidden")), 4)
    if not tied:
        yield replace(layout.table("output layer", rows, hidden, 4), multiplied=True)
        if sizes["model.include_bias"]:
            yield Weight("bias of the output layer", product((rows, "rows")), 4)


def _of_block(sizes: Sizes) -> Iterator[Weight]:
    block = sizes.block
    yield layout.attention(block, 4)
    if sizes["model.include_bias"]:
        rows = (2 * block.queries + 2 * block.keys, "rows of q, k, v, o")
        yield Weight("biases of attention", product(rows), 4)
    if sizes["model.layer_norm_with_affine"]:
        vectors = product((2, "norms"), (sizes.vectors, "vectors"), (block.hidden, "hidden"))
        yield Weight("norms", vectors, 4)
    if sizes["model.attention_layer_norm"] and sizes["model.attention_layer_norm_with_affine"]:
        rows = (block.queries + block.keys, "of q and k")
        yield Weight("norms of q and k", product((sizes.vectors, "vectors"), rows), 4)
    if block.experts:
        yield from (replace(one, expert=False) for one in layout.experts(block, 4))
        if sizes["model.include_bias"]:
            yield Weight("bias of experts", product((block.hidden, "hidden")), 4)
        if block.shared:
            yield replace(layout.ffn(block, 4), title="shared expert")
    else:
        yield layout.ffn(block, 4)
        if sizes["model.include_bias"]:
            first = block.width * (block.matrices - 1)
            yield Weight("biases of the FFN", product((first + block.hidden, "rows")), 4)
    if block.coefficients:
        yield layout.coefficients(block)


def _states(sizes: Sizes) -> Iterator[State]:
    sharded = sizes.shards > 1
    yield State("weights", "float32 weights", {4: 4}, sharded, saved=True)
    yield State("gradients", "gradients", {4: 4}, sharded)
    if not sizes.fsdp:
        yield State("gradients", "buckets that DDP reduces", {4: 4})
    yield State("optimizer", "AdamW's two moments", {4: 8}, sharded, saved=True)


def _numbers(weights: list[Weight]) -> int:
    return sum(one.count.value for one in weights)


def _held(
    sizes: Sizes, layers: int, block: list[Weight], root: list[Weight]
) -> Iterator[tuple[Factor, Held]]:
    element = (sizes.stored, BYTES)
    of_block, of_root = (_numbers(block), "parameters"), (_numbers(root), "parameters")
    once = (1, "")
    if (
        sizes.fsdp and sizes.shards > 1
    ):  # the present block and the one that is fetched, where weights go back
        blocks = min(layers, 2) if sizes.strategy in ("FULL_SHARD", "HYBRID_SHARD") else layers
        yield (blocks, "blocks"), Held("gathered weights", product(of_block, element), "gathered")
        yield once, Held("gathered weights of the ends", product(of_root, element), "gathered")
        yield once, Held("a block's gradients, whole", product(of_block, element), "gathered")
    elif sizes.stored == 2:
        yield (layers, "blocks"), Held("16-bit copies of weights", product(of_block, element), "gathered")
        yield once, Held("16-bit copies of the ends", product(of_root, element), "gathered")
    yield once, _tensor(sizes, "token ids", (8, BYTES))
    whole = CHECKPOINTED[sizes["activation_checkpointing"]] * layers
    recomputed = -(-whole.numerator // whole.denominator)
    if recomputed:
        boundary = _tensor(sizes, "input of recomputed blocks", (sizes.block.hidden, "hidden"), element)
        yield (recomputed, "recomputed blocks"), boundary
    for one in _block_tensors(sizes):
        if layers > recomputed:
            yield (layers - recomputed, "blocks"), one
        if recomputed:
            yield (1, "recomputed now"), one
    yield from ((once, one) for one in _last(sizes))


def _tensor(sizes: Sizes, title: str, *times: Factor) -> Held:
    return Held(title, Product(((sizes.micro, "sequences"), (sizes.sequence, "tokens"), *times)))


def _norm(sizes: Sizes, title: str) -> Iterator[Held]:
    """RMSNorm: float32 input, x / rms and result; under `fine_grained` input and result."""
    rms, fine = sizes["model.layer_norm_type"] == "rms", sizes["activation_checkpointing"] == "fine_grained"
    wide = 4 + 2 * sizes.stored if rms else (4 + sizes.stored + (4 if sizes.stored == 2 else 0))
    if fine:
        wide = 2 * sizes.stored
    yield _tensor(sizes, title, (sizes.block.hidden, "hidden"), (wide, BYTES))
    if not fine:
        yield _tensor(sizes, f"{title}: of rows", (4 if rms else 8, BYTES))


def _block_tensors(sizes: Sizes) -> Iterator[Held]:
    block, element = sizes.block, (sizes.stored, BYTES)
    both, fine = (
        (block.queries + block.keys, "of q and k"),
        sizes["activation_checkpointing"] == "fine_grained",
    )
    yield from _norm(sizes, "norm before attention")
    yield _tensor(sizes, "q, k, v of one projection", (block.queries + 2 * block.keys, "of q, k, v"), element)
    if not fine:
        if sizes["model.attention_layer_norm"]:
            copies = (4 if sizes.stored == 2 else 0) + sizes.stored
            yield _tensor(sizes, "norm of q and k", both, (copies, BYTES))
            yield _tensor(sizes, "norm of q and k: of rows", (2, "norms"), (4, BYTES))
        if sizes["model.rope"] or sizes["model.attention_layer_norm"]:
            yield _tensor(sizes, "q and k as attention takes them", both, element)
        if block.keys != block.queries and not sizes["model.flash_attention"]:
            yield _tensor(sizes, "k and v of all heads", (2 * block.queries, "of k and v"), element)
        yield _tensor(sizes, "log of sums", (sizes.count("model.n_heads"), "heads"), (4, BYTES))
    yield _tensor(sizes, "result of attention", (block.queries, "of q"), element)
    yield from _norm(sizes, "norm before the FFN")
    rows: tuple[Factor, ...] = ((block.chosen, "chosen experts"),) if block.experts else ()
    if rows:
        yield _tensor(sizes, "router", (8 * block.experts + 20 * block.chosen, BYTES))
        yield _tensor(sizes, "order of the rows", *rows, (16, BYTES))
        yield _tensor(sizes, "experts' input and output", (2, ""), *rows, (block.hidden, "hidden"), element)
    yield from _wide(sizes, rows)
    if block.shared:
        yield from _wide(sizes, ())
    if sizes["model.residual_dropout"]:
        yield _tensor(sizes, "dropout's masks", (2, ""), (block.hidden, "hidden"))


def _wide(sizes: Sizes, rows: tuple[Factor, ...]) -> Iterator[Held]:
    """Tensors of the FFN's width: x, and FC2's input; gated ones keep silu of one half too."""
    entry, order = activations.parse(sizes.spec.activation)
    fine, element = sizes["activation_checkpointing"] == "fine_grained", (sizes.stored, BYTES)
    width = (sizes.block.width, "width")
    before = (2 if fine and not rows else 3) if entry.gated else entry.keeps
    if before:
        yield _tensor(sizes, "x of the activation", (before, ""), *rows, width, element)
    sums = 0 if entry.name in NATIVE or fine else entry.row_sums(order)
    if sums:
        yield _tensor(sizes, "sums of the activation's rows", *rows, (4 * sums, BYTES))
    yield _tensor(sizes, "FC2's input", *rows, width, element)


def _last(sizes: Sizes) -> Iterator[Held]:
    yield from _norm(sizes, "last norm")
    rows = sizes["model.embedding_size"] or sizes.count("model.vocab_size")
    yield _tensor(sizes, "log-softmax of the logits", (rows, "vocabulary"), (4, BYTES))
    yield _tensor(sizes, "labels", (8, BYTES))


def _messages(sizes: Sizes, layers: int, block: list[Weight], root: list[Weight]) -> Iterator[Message]:
    of_blocks = layers * _numbers(block)
    everything = of_blocks + _numbers(root)
    times = (sizes.micro_batches, "micro-batches")
    world = (sizes.spec.world_size, "ranks")
    if world[0] == 1:
        return
    if not sizes.fsdp or sizes.shards == 1:
        each = times if sizes.fsdp or sizes["ddp.grad_sync_mode"] == "micro_batch" else (1, "")
        gradients = product(each, (everything, "parameters"), (sizes.reduced, BYTES))
        yield Message("data parallel", "gradients", layout.all_reduce(gradients, world))
        return
    shards = (sizes.shards, "shards")
    forward = product(times, (everything, "parameters"), (sizes.stored, BYTES))
    yield Message("fully sharded", "weights, forward", layout.gather(forward, shards))
    if sizes.strategy in ("FULL_SHARD", "HYBRID_SHARD"):
        backward = product(times, (of_blocks, "parameters"), (sizes.stored, BYTES))
        yield Message("fully sharded", "weights, backward", layout.gather(backward, shards))
    gradients = product(times, (everything, "parameters"), (sizes.reduced, BYTES))
    yield Message("fully sharded", "gradients", layout.gather(gradients, shards))
    copies = (world[0] // sizes.shards, "replicas")
    if copies[0] > 1:
        yield Message("data parallel", "gradients", layout.all_reduce(gradients / shards, copies))


def _notes(sizes: Sizes) -> Iterator[str]:
    if sizes["model.flash_attention"] or sizes.spec.upstream == "olmo-moe":
        yield "what flash-attn and megablocks keep is reckoned from their code, not measured"


def alternatives(sizes: Sizes) -> Iterator[tuple[str, ...]]:
    """All weights sharded, smaller micro-batches, recomputed activations: the cheapest first."""
    mixture, device = bool(sizes.block.experts), sizes.batch // sizes.spec.world_size
    given = sizes.count("device_train_microbatch_size")
    sharded = ("olmo.fsdp.sharding_strategy=FULL_SHARD",) if sizes.fsdp else ()
    for again in (None, "fine_grained" if mixture else "whole_layer"):
        for micro in range(min(given, device), 0, -1):
            if device % micro:
                continue
            changes = [one for one in sharded if not one.endswith(f"={sizes.strategy}")]
            if micro != sizes.micro:
                changes.append(f"olmo.device_train_microbatch_size={micro}")
            if again != sizes["activation_checkpointing"]:
                changes.append(f"olmo.activation_checkpointing={again or 'null'}")
            yield tuple(changes)
