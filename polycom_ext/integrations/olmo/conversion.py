"""OLMo's checkpoints, of 0.6.0 and of its MoE branch, as models apart from OLMo, and back, without it.

Weights of any format that OLMo has saved are read; what is written is an unsharded checkpoint of the weights
alone, at step 0 of a run that has yet to begin: `load_path` with `reset_optimizer_state` and
`reset_trainer_state`. What the model is, `model` in config.yaml says.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from polycom_ext.checkpoints.archive import Waiting
from polycom_ext.checkpoints.constants import complete
from polycom_ext.checkpoints.forms import Found, Options
from polycom_ext.checkpoints.model import Concatenated, Model, Row, check_layers, shapes
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.olmo import exchange, saved, weights
from polycom_ext.integrations.olmo.native import NATIVE
from polycom_ext.runs import tokenizer
from polycom_ext.runs.record import Record

if TYPE_CHECKING:
    from torch import Tensor


class QueriesKeysValues:
    """All queries, all keys, all values, along the first dimension."""

    def split(self, tensor: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, ...]:
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        sizes = [count * config["head_dim"] for count in (heads, groups, groups)]
        if sum(sizes) != len(tensor):
            raise PolycomError(
                f"queries, keys and values have {len(tensor)} rows, and {heads} + {groups} + {groups} heads "
                f"of {config['head_dim']} need {sum(sizes)}"
            )
        return tuple(part.contiguous() for part in tensor.split(sizes))

    def join(self, tensors: tuple[Tensor, ...], config: Mapping[str, Any]) -> Tensor:
        import torch

        return torch.cat(tensors)


class Experts:
    """The rows of one expert after another's: (experts * width, hidden) is (experts, width, hidden)."""

    def split(self, tensor: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return (tensor.unflatten(0, (config["num_experts"], -1)),)

    def join(self, tensors: tuple[Tensor, ...], config: Mapping[str, Any]) -> Tensor:
        return tensors[0].flatten(0, 1)


class TransposedExperts:
    """Likewise (experts * width, hidden) is (experts, hidden, width)."""

    def split(self, tensor: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return (tensor.unflatten(0, (config["num_experts"], -1)).transpose(1, 2).contiguous(),)

    def join(self, tensors: tuple[Tensor, ...], config: Mapping[str, Any]) -> Tensor:
        return tensors[0].transpose(1, 2).flatten(0, 1)


QKV = QueriesKeysValues()
EXPERTS, TRANSPOSED = Experts(), TransposedExperts()
ATTENTION = (
    Row("att_proj.weight", tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), QKV),
    Row("att_proj.bias", tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), QKV),
    Row("q_norm.weight", ("self_attn.q_proj.norm.weight",)),
    Row("k_norm.weight", ("self_attn.k_proj.norm.weight",)),
    Row("attn_out.weight", ("self_attn.o_proj.weight",)),
    Row("attn_out.bias", ("self_attn.o_proj.bias",)),
)
"""Of a block's names."""
NORMS = (
    Row("attn_norm.weight", ("input_layernorm.weight",)),
    Row("attn_norm.bias", ("input_layernorm.bias",)),
    Row("ff_norm.weight", ("post_attention_layernorm.weight",)),
    Row("ff_norm.bias", ("post_attention_layernorm.bias",)),
)
NORMS_AFTER = (
    Row("attn_norm.weight", ("post_attention_layernorm.weight",)),
    Row("attn_norm.bias", ("post_attention_layernorm.bias",)),
    Row("ff_norm.weight", ("post_feedforward_layernorm.weight",)),
    Row("ff_norm.bias", ("post_feedforward_layernorm.bias",)),
)
"""Where `norm_after` says so."""
APART = tuple(
    Row(f"{x}_proj.{what}", (f"self_attn.{x}_proj.{what}",)) for x in "qkv" for what in ("weight", "bias")
)
"""Instead of att_proj in a block of the type `llama`; not written."""
DENSE = (
    Row("ff_proj.weight", ("mlp.up_proj.weight",)),
    Row("ff_proj.bias", ("mlp.up_proj.bias",)),
    Row("ff_out.weight", ("mlp.down_proj.weight",)),
    Row("ff_out.bias", ("mlp.down_proj.bias",)),
)
NATIVELY_GATED = (
    Row("ff_proj.weight", ("mlp.up_proj.weight", "mlp.gate_proj.weight"), Concatenated(-2)),
    Row("ff_proj.bias", ("mlp.up_proj.bias", "mlp.gate_proj.bias"), Concatenated(-1)),
    *DENSE[2:],
)
"""OLMo's own SwiGLU reads its gate from the second half."""
GATED = (
    Row("ff_proj.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), Concatenated(-2)),
    Row("ff_proj.bias", ("mlp.gate_proj.bias", "mlp.up_proj.bias"), Concatenated(-1)),
    *DENSE[2:],
)
MOE = (
    Row("ffn.router.layer.weight", ("mlp.gate.weight",)),
    Row("ffn.experts.mlp.w1", ("mlp.experts.up_proj",), EXPERTS),
    Row("ffn.experts.mlp.w2", ("mlp.experts.down_proj",), TRANSPOSED),
)
MOE_GATED = (
    MOE[0],
    Row("ffn.experts.mlp.w1", ("mlp.experts.gate_proj",), EXPERTS),
    Row("ffn.experts.mlp.v1", ("mlp.experts.up_proj",), EXPERTS),
    MOE[2],
)
AROUND = (
    Row("transformer.wte.weight", ("model.embed_tokens.weight",)),
    Row("transformer.ln_f.weight", ("model.norm.weight",)),
    Row("transformer.ln_f.bias", ("model.norm.bias",)),
    Row("transformer.ff_out.weight", ("lm_head.weight",)),
)
BEGINNING: dict[str, Any] = {
    **{"epoch": 0, "global_step": 0, "world_size": 1},
    **{"global_train_examples_seen_this_epoch": 0, "global_train_tokens_seen": 0},
    **{f"{kind}checkpoints": list[str]() for kind in ("", "unsharded_", "ephemeral_")},
}
"""The state of a trainer that has yet to begin: OLMo reads one even where it is told to take none of it."""
TOKENIZER = "tokenizer.json"
STEP = "step0-unsharded"
"""OLMo knows an unsharded checkpoint by the end of its folder's name."""


class Checkpoints:
    """Reads and writes them."""

    def find(self, path: Path) -> Found | None:
        if saved.is_checkpoint(path):
            return Found(path)
        for folder in (path, Record(path).checkpoints):
            chosen = saved.choice_of_weights(folder)
            if chosen.path is not None:
                return Found(chosen.path, tuple(map(str, chosen.damaged)))
            if chosen.damaged:
                raise PolycomError(f"no checkpoint is whole: {'; '.join(map(str, chosen.damaged))}")
        return None

    def read(self, path: Path) -> Model:
        problem = saved.problem_of_weights(path)
        if problem is not None:
            raise PolycomError(f"{path} {problem}: name another checkpoint")
        settings = _settings(path)
        config = exchange.read(settings.get("model"), str(path))
        stored = weights.readers(path)
        complete(config, str(path))
        check_layers(config, len(stored), str(path))
        rows = {row.theirs: row for row in (*rows_of(config), *_apart(config))}
        readers: dict[str, Callable[[], Any]] = {}
        for name, reader in stored.items():
            if name not in rows:
                raise PolycomError(f"{path} holds {name}, for which the exchange format has no place")
            readers.update(rows[name].read(reader, config))
        return tokenizer.added(Model(config, readers, str(path), _tokenizer(path, settings)), path)

    def write(self, model: Model, folder: Path, options: Options, advance: Callable[[int], object]) -> None:
        settings = {"run_name": "converted", "model": exchange.written(model.config, model.source)}
        (folder / STEP).mkdir()
        given = options.tokenizer or model.files.get(TOKENIZER)
        if given is not None:  # OLMo looks for it from where it runs, so by its whole path
            settings["tokenizer"] = {"identifier": str(given.resolve())}
            shutil.copyfile(given, folder / STEP / TOKENIZER)
        _write_weights(model, folder / STEP, options, advance)
        text = yaml.safe_dump(settings, sort_keys=False)
        (folder / STEP / "config.yaml").write_text(text, encoding="utf-8")


CHECKPOINTS = Checkpoints()


def rows_of(config: Mapping[str, Any]) -> Iterator[Row]:
    """The lines of the table that a model of this configuration has, by whole names."""
    activation, experts = config["activation"], config["num_experts"]
    if experts:
        feed_forward, inside = MOE_GATED if activation["gated"] else MOE, "mlp.experts.act_fn"
    else:
        gated = NATIVELY_GATED if activation["name"] in NATIVE else GATED
        feed_forward, inside = gated if activation["gated"] else DENSE, "mlp.act_fn"
    first = f"model.layers.0.{inside}."
    names = [name.removeprefix(first) for name in shapes(config) if name.startswith(first)]
    coefficients = [Row(f"act.{name}", (f"{inside}.{name}",)) for name in names]
    norms = NORMS_AFTER if config["norm_after"] else NORMS
    for layer in range(config["num_hidden_layers"]):
        yield from (_in_block(layer, row) for row in (*norms, *ATTENTION, *feed_forward, *coefficients))
    yield from AROUND


def _in_block(layer: int, row: Row) -> Row:
    ours = tuple(f"model.layers.{layer}.{name}" for name in row.ours)
    return Row(f"transformer.blocks.{layer}.{row.theirs}", ours, row.layout)


def _apart(config: Mapping[str, Any]) -> Iterator[Row]:
    return (_in_block(layer, row) for layer in range(config["num_hidden_layers"]) for row in APART)


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PolycomError(f"{path / 'config.yaml'} cannot be read: {error}") from None
    return settings if isinstance(settings, dict) else {}


def _tokenizer(path: Path, settings: dict[str, Any]) -> dict[str, Path]:
    """That which was converted with it, or the file from which OLMo had it."""
    named = settings.get("tokenizer")
    identifier = named.get("identifier") if isinstance(named, dict) else None
    places = [path / TOKENIZER, *([Path(identifier)] if isinstance(identifier, str) else [])]
    found = next((place for place in places if place.is_file()), None)
    return {} if found is None else {TOKENIZER: found}


def _write_weights(model: Model, folder: Path, options: Options, advance: Callable[[int], object]) -> None:
    """One file of all tensors."""
    import torch

    state: dict[str, Tensor] = {}
    with Waiting(folder / "weights") as waiting:
        for row in rows_of(model.config):
            if row.ours[0] not in model.tensors:
                continue
            tensor = row.write(model.tensors, model.config)
            if options.dtype is not None and ".act." not in row.theirs:
                tensor = tensor.to(getattr(torch, options.dtype))
            state[row.theirs] = waiting.add(tensor)
            for _ in row.ours:
                advance(tensor.nbytes // len(row.ours))
        torch.save(state, folder / "model.pt")
    torch.save(BEGINNING, folder / "train.pt")
