"""What Megatron keeps of a micro-batch for its backward pass, tensor by tensor.

On Megatron's own layers (`--transformer-impl local`) every line is what autograd was seen to keep on a CPU;
on Transformer Engine's it was read from the code of its layers and of FlashAttention 2. Tensors that only
live within a pass (gradients of activations, workspaces) are not here.
"""

from __future__ import annotations

from collections.abc import Iterator

from polycom_ext import activations
from polycom_ext.integrations.megatron.native import FLAGS
from polycom_ext.integrations.megatron.sizes import Sizes
from polycom_ext.runs.layout import BYTES, Factor, Held, Product


def tensor(sizes: Sizes, title: str, *times: Factor, over: tuple[Factor, ...] = ()) -> Held:
    """So many numbers for each token of a micro-batch; the last factor is bytes."""
    tokens = ((sizes.micro, "sequences"), (sizes.sequence, "tokens"))
    return Held(title, Product((*tokens, *times), ((sizes.context, "context ranks"), *over)))


def layer(sizes: Sizes, mixture: bool) -> list[Held]:
    """Of one layer, without the parts that the spec has recomputed."""
    dropped = sizes.recomputes("moe" if mixture else "mlp")
    kept = [*_norm(sizes, "norm before attention"), *_attention(sizes), *_norm(sizes, "norm before the FFN")]
    if not dropped:
        kept += _mixture(sizes) if mixture else _ffn(sizes, sizes.dense_width)
    if sizes["hidden-dropout"]:
        # a byte an element on a GPU; on a CPU torch keeps masks of the input's type
        kept.append(tensor(sizes, "dropout's masks", (2, ""), _hidden(sizes), over=(sizes.share,)))
    return kept


def boundary(sizes: Sizes) -> Held:
    """A layer's input: all that is kept of what is recomputed as a whole."""
    over = sizes.share
    if sizes["distribute-saved-activations"]:
        over = (sizes.tensor, "tensor ranks")
    return tensor(sizes, "input of recomputed layers", _hidden(sizes), _element(sizes), over=(over,))


def first(sizes: Sizes) -> Iterator[Held]:
    """Of the embedding."""
    yield tensor(sizes, "token ids", (8, BYTES))
    if sizes["hidden-dropout"]:
        yield tensor(sizes, "embedding dropout's mask", _hidden(sizes), over=(sizes.share,))


def every_stage(sizes: Sizes) -> Iterator[Held]:
    """Once for all layers of a stage."""
    if sizes.local:
        yield tensor(sizes, "causal mask", (sizes.sequence, "tokens"))


def last(sizes: Sizes) -> Iterator[Held]:
    """Of the last norm, the output layer and the loss."""
    yield from _norm(sizes, "last norm")
    rows = (sizes.vocabulary, "vocabulary")
    split = (sizes.tensor, "tensor ranks")
    in_place = sizes["cross-entropy-loss-fusion"] and sizes["cross-entropy-fusion-impl"] == "te"
    size = _element(sizes) if in_place else (4, BYTES)  # upstream's own softmax is float32
    yield tensor(sizes, "softmax of the logits", rows, size, over=(split,))
    yield tensor(sizes, "labels, masks", (13 if sizes.tensor == 1 else 14, BYTES))


def _hidden(sizes: Sizes) -> Factor:
    return (sizes.block.hidden, "hidden")


def _element(sizes: Sizes) -> Factor:
    return (sizes.stored, BYTES)


def _norm(sizes: Sizes, title: str) -> Iterator[Held]:
    """Input and result. torch's own RMSNorm keeps input and x / rms in float32, whatever the type."""
    rms = sizes["normalization"] == "RMSNorm"
    wide = 8 + sizes.stored if sizes.local and rms else 2 * sizes.stored
    if sizes.recomputes("layernorm"):
        wide -= sizes.stored
    yield tensor(sizes, title, _hidden(sizes), (wide, BYTES), over=(sizes.share,))
    yield tensor(sizes, f"{title}: of rows", (4 if rms else 8, BYTES), over=(sizes.share,))


def _attention(sizes: Sizes) -> Iterator[Held]:
    block, split = sizes.block, (sizes.tensor, "tensor ranks")
    grouped = sizes.groups != sizes.heads
    core = not sizes.recomputes("core_attn")
    both = (block.queries + block.keys, "of q and k")
    whole = (block.queries + 2 * block.keys, "of q, k, v")
    if sizes["qk-layernorm"]:  # in_ and x / rms: of a 16-bit type both are float32 copies
        copies = (8 if sizes.stored == 2 else 4) if sizes.local else sizes.stored
        yield tensor(sizes, "norm of q and k", both, (copies, BYTES), over=(split,))
        yield tensor(
            sizes,
            "norm of q and k: of rows",
            (sizes.heads + sizes.groups, "heads"),
            (4, BYTES),
            over=(split,),
        )
    if not sizes.local:
        yield tensor(sizes, "q, k, v as attention takes them", whole, _element(sizes), over=(split,))
        results = (2 if core else 1, "attention's and the projection's")
        yield tensor(
            sizes, "result of attention", results, (block.queries, "of q"), _element(sizes), over=(split,)
        )
        if core:
            yield tensor(sizes, "log of sums", (sizes.heads, "heads"), (4, BYTES), over=(split,))
        return
    if grouped:  # repeated for all heads
        yield tensor(
            sizes, "q, k, v of all heads", (3 * block.queries, "of q, k, v"), _element(sizes), over=(split,)
        )
    else:
        yield tensor(sizes, "q, k, v of one projection", whole, _element(sizes), over=(split,))
        rotated = both if sizes["position-embedding-type"] == "rope" else None
        if rotated:
            yield tensor(sizes, "q and k, rotated", rotated, _element(sizes), over=(split,))
    if sizes["position-embedding-type"] == "rope":  # the same for all sequences
        angles = Product(
            ((sizes.sequence, "tokens"), (4, "cosines and sines"), (sizes.head, "of a head"), _element(sizes))
        )
        yield Held("rotation", angles)
    if core:
        scores = ((sizes.heads, "heads"), (sizes.sequence, "tokens"))
        yield tensor(sizes, "attention's probabilities", *scores, _element(sizes), over=(split,))
        if sizes["attention-dropout"]:
            more = (sizes.stored + 1, BYTES)
            yield tensor(sizes, "probabilities after dropout, mask", *scores, more, over=(split,))
    yield tensor(sizes, "result of attention", (block.queries, "of q"), _element(sizes), over=(split,))


def wide_tensors(sizes: Sizes, expert: bool) -> tuple[int, int]:
    """How many tensors of the FFN's width backward needs: up to the activation, and after it.

    The first are what it reads of FC1's output, twice as wide where it is gated; the last of the second is
    FC2's input, which a discarding checkpoint forms again.
    """
    name = sizes.spec.entry.name
    if sizes["swiglu"]:
        if not sizes["no-bias-swiglu-fusion"]:
            return 2, 1
        return (
            4,
            2 if expert else 1,
        )  # halves, silu and the other one with an offset of nothing, their product
    if name in FLAGS:  # gelu(x), relu(x) squared
        return 1, 2 if expert else 1
    one_pass = sizes.spec.entry.takes_variants
    return sizes.spec.entry.keeps, 2 if expert and not one_pass else 1


def _wide(
    sizes: Sizes, width: int, split: Factor, rows: tuple[Factor, ...], over: tuple[Factor, ...], expert: bool
) -> Iterator[Held]:
    entry, order = activations.parse(sizes.spec.activation)
    before, after = wide_tensors(sizes, expert)
    again = sizes.recomputes("moe_act" if expert and sizes["moe-grouped-gemm"] else "mlp_act")
    sums = entry.row_sums(order) if entry.name not in FLAGS else 0
    each = (*rows, (width, "width"))
    shared = (*over, split)
    if before:
        yield tensor(sizes, "x of the activation", (before, ""), *each, _element(sizes), over=shared)
    if sums and not again:
        yield tensor(sizes, "sums of the activation's rows", *rows, (4 * sums, BYTES), over=over)
    if after > again:
        yield tensor(sizes, "FC2's input", (after - again, ""), *each, _element(sizes), over=shared)


def _ffn(sizes: Sizes, width: int) -> list[Held]:
    return list(_wide(sizes, width, (sizes.tensor, "tensor ranks"), (), (), False))


def _mixture(sizes: Sizes) -> Iterator[Held]:
    """As if every expert got as many tokens as every other: what routing makes of it is not known before."""
    block, share = sizes.block, sizes.share
    chosen = (block.chosen, "chosen experts")
    rows = (chosen, (sizes.expert_tensor, "expert-tensor ranks"))
    yield tensor(sizes, "router", (8 * block.experts + 12 * block.chosen, BYTES), over=(share,))
    yield tensor(sizes, "order of the rows", *rows, (28, BYTES), over=(share,))
    yield tensor(sizes, "experts' input", *rows, _hidden(sizes), _element(sizes), over=(share,))
    split = (sizes.expert_tensor, "expert-tensor ranks")
    yield from _wide(sizes, block.width, split, rows, (share,), True)
    if block.shared and not sizes.recomputes("shared_experts"):
        yield from _ffn(sizes, block.shared)
