"""What a rank of Megatron sends in a step, by collectives on rings and by point-to-point sends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from polycom_ext import activations
from polycom_ext.integrations.megatron.native import FLAGS
from polycom_ext.integrations.megatron.sizes import Sizes
from polycom_ext.runs.layout import BYTES, Factor, Message, Product, Stage, all_reduce, gather


def of_stage(sizes: Sizes, index: int, kinds: Sequence[bool], stage: Stage) -> tuple[Message, ...]:
    """All of pipeline stage `index`, whose layers are mixtures or not.

    The small ones are left out: gradients of norms under sequence parallelism, gradient norms, losses.
    """
    found = [*_tensor(sizes, index, kinds), *_rows(sizes, kinds), *_experts(sizes, sum(kinds))]
    found += [*_context(sizes, len(kinds)), *_pipeline(sizes, index), *_data(sizes, stage)]
    return tuple(message for message in found if message.size.exact)


def _tokens(sizes: Sizes, *times: Factor, over: tuple[Factor, ...] = ()) -> Product:
    """For each token of all micro-batches that a rank takes in a step."""
    tokens = ((sizes.micro_batches, "micro-batches"), (sizes.micro, "sequences"), (sizes.sequence, "tokens"))
    return Product((*tokens, *times), ((sizes.context, "context ranks"), *over))


def _state(sizes: Sizes, *times: Factor, over: tuple[Factor, ...] = ()) -> Product:
    """Hidden states."""
    return _tokens(sizes, *times, (sizes.block.hidden, "hidden"), (sizes.stored, BYTES), over=over)


def _tensor(sizes: Sizes, index: int, kinds: Sequence[bool]) -> Iterator[Message]:
    """Between linear layers, for attention and a dense FFN alike, in passes forward and backward.

    Two all-reduces, or five gathers and scatters: the fifth is of an input that backward needs whole again.
    """
    ranks = (sizes.tensor, "tensor ranks")
    if sizes.tensor == 1:
        return
    parts = len(kinds) + sum(not mixture or bool(sizes.block.shared) for mixture in kinds)
    over_again = parts if sizes.recomputed_whole else 0
    kind = "tensor parallel"
    if sizes.sequence_parallel:
        count = (5 * parts + 2 * over_again, "gathers and scatters")
        yield Message(kind, "between linear layers", gather(_state(sizes, count), ranks))
    else:
        count = (2 * parts + over_again, "all-reduces")
        yield Message(kind, "between linear layers", all_reduce(_state(sizes, count), ranks))
    ends = int(index == 0), int(index == sizes.pipeline - 1)
    if any(ends) and sizes.sequence_parallel:
        count = (2 * ends[0] + 3 * ends[1], "gathers and scatters")
        yield Message(kind, "embedding, output layer", gather(_state(sizes, count), ranks))
    elif any(ends):
        yield Message(
            kind, "embedding, output layer", all_reduce(_state(sizes, (sum(ends), "all-reduces")), ranks)
        )
    if ends[1]:
        yield Message(kind, "loss", all_reduce(_tokens(sizes, (3, "numbers"), (4, BYTES)), ranks))


def _rows(sizes: Sizes, kinds: Sequence[bool]) -> Iterator[Message]:
    """The activation's sums of rows that are sharded: float64 forward, float32 backward."""
    entry, order = activations.parse(sizes.spec.activation)
    if entry.name in FLAGS or not entry.learnable:
        return
    kind, sums = "row sums", entry.row_sums(order)
    places = (
        (kinds.count(False), (sizes.tensor, "tensor ranks"), (), (), ("mlp", "mlp_act")),
        (
            kinds.count(True),
            (sizes.expert_tensor, "expert-tensor ranks"),
            ((sizes.block.chosen, "chosen experts"), (sizes.expert_tensor, "expert-tensor ranks")),
            (sizes.share,),
            ("moe", "moe_act" if sizes["moe-grouped-gemm"] else "mlp_act"),
        ),
        (
            kinds.count(True) if sizes.block.shared else 0,
            (sizes.tensor, "tensor ranks"),
            (),
            (),
            ("moe", "shared_experts", "mlp_act"),
        ),
    )
    for layers, ranks, rows, over, again in places:
        if not layers or ranks[0] == 1:
            continue
        if not sums:
            numbers = (
                (layers, "layers"),
                (sizes.micro_batches, "micro-batches"),
                (entry.parameters(order), "coefficients"),
            )
            yield Message(
                kind, "gradients of coefficients", all_reduce(Product((*numbers, (4, BYTES))), ranks)
            )
            continue
        times = 2 if sizes.recomputed_whole or any(map(sizes.recomputes, again)) else 1
        each = ((layers, "layers"), *rows)
        forward = _tokens(sizes, *each, (times, "forward passes"), (8 * sums, BYTES), over=over)
        backward = _tokens(sizes, *each, (4 * (sums + 1), BYTES), over=over)
        yield Message(kind, "forward", all_reduce(forward, ranks))
        yield Message(kind, "backward", all_reduce(backward, ranks))


def _experts(sizes: Sizes, layers: int) -> Iterator[Message]:
    """Tokens to their experts and back, forward and backward."""
    if not layers:
        return
    passes = 6 if sizes.recomputed_whole or sizes.recomputes("moe") else 4
    ranks, chosen = (sizes.expert, "expert ranks"), (sizes.block.chosen, "chosen experts")
    times = ((layers, "layers"), (passes, "exchanges"))
    if sizes["moe-token-dispatcher-type"] == "allgather":
        all_ranks = (sizes.expert * sizes.expert_tensor, "expert ranks")
        whole = _state(sizes, *times, all_ranks, over=(sizes.share,))
        yield Message("expert parallel", "gathers and scatters of tokens", gather(whole, all_ranks))
        return
    rows = _state(sizes, *times, chosen, over=(sizes.share,))
    yield Message("expert parallel", "all-to-all of tokens", gather(rows, ranks))
    split = (sizes.expert_tensor, "expert-tensor ranks")
    whole = _state(sizes, *times, chosen, split, over=(sizes.share,))
    yield Message("expert parallel", "gathers and scatters of rows", gather(whole, split))


def _context(sizes: Sizes, layers: int) -> Iterator[Message]:
    """Keys and values around a ring, forward, and with their gradients backward."""
    times = (
        (layers, "layers"),
        (sizes.context - 1, "others"),
        (3, "exchanges"),
        (2 * sizes.block.keys, "of k and v"),
    )
    size = _tokens(sizes, *times, (sizes.stored, BYTES), over=((sizes.tensor, "tensor ranks"),))
    yield Message("context parallel", "keys and values", size)


def _pipeline(sizes: Sizes, index: int) -> Iterator[Message]:
    """Hidden states to the next chunk, gradients to the one before."""
    is_first, is_last = index == 0, index == sizes.pipeline - 1
    sends = 2 * sizes.chunks - is_first - is_last
    if sizes.pipeline > 1:
        size = _state(sizes, (sends, "sends"), over=(sizes.share,))
        yield Message("pipeline parallel", "states and gradients", size)
    if sizes.pipeline > 1 and (is_first or is_last) and not sizes["untie-embeddings-and-output-weights"]:
        table = Product(
            ((sizes.vocabulary, "rows"), (sizes.block.hidden, "hidden"), (sizes.gradient, BYTES)),
            ((sizes.tensor, "tensor ranks"),),
        )
        yield Message(
            "pipeline parallel", "gradient of the shared embedding", all_reduce(table, (2, "stages"))
        )


def _data(sizes: Sizes, stage: Stage) -> Iterator[Message]:
    """Gradients, once a step; with the distributed optimizer the new weights as well."""
    places = (
        (False, "", (sizes.replicas * sizes.context, "replicas")),
        (True, " of experts", (sizes.expert_replicas, "replicas")),
    )
    for expert, of_what, ranks in places:
        for stored in (2, 4):
            count = (stage.parameters(expert, stored), "parameters")
            if not count[0] or (stored == 4 and sizes.stored == 2):  # coefficients: a few numbers
                continue
            gradients = Product((count, (sizes.gradient, BYTES)))
            if not sizes["use-distributed-optimizer"]:
                yield Message("data parallel", f"gradients{of_what}", all_reduce(gradients, ranks))
                continue
            yield Message("data parallel", f"gradients{of_what}", gather(gradients, ranks))
            yield Message(
                "data parallel", f"weights{of_what}", gather(Product((count, (stored, BYTES))), ranks)
            )
