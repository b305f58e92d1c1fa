"""What the patches open in OLMo 0.6.0: names, initialisation, weight decay."""

import copy
from typing import Any

import pytest
import torch

from polycom_ext.activations import REGISTRY
from polycom_ext.errors import PolycomError

pytestmark = pytest.mark.usefixtures("olmo")


def config(**changes: Any) -> Any:
    """A tiny ModelConfig."""
    from olmo.config import ModelConfig

    settings: dict[str, Any] = {
        "d_model": 32,
        "n_heads": 2,
        "n_layers": 2,
        "mlp_hidden_size": 96,
        "vocab_size": 64,
    }
    settings |= {"embedding_size": 64, "max_sequence_length": 16, "rope": True, "init_device": "cpu"}
    return ModelConfig(**(settings | changes))


@pytest.mark.parametrize("block", ["sequential", "llama", "moe"])
@pytest.mark.parametrize("name", [*REGISTRY, "polynorm-4"])
def test_every_activation_builds_in_every_block(block: str, name: str) -> None:
    from olmo.model import OLMo

    from polycom_ext.integrations.olmo.activation import coefficient_names

    model = OLMo(config(activation_type=name, block_type=block))
    model(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    entry = REGISTRY[name.partition("-")[0]]
    act = model.transformer.blocks[1].act
    own = dict(act.named_parameters())
    assert bool(own) is entry.learnable
    assert [*own][:2] == ["weight", "bias"] or not entry.ordered
    assert coefficient_names(model) == {f"transformer.blocks.{i}.act.{n}" for i in range(2) for n in own}
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert act.output_multiplier == (0.5 if entry.gated else 1.0)


def test_upstreams_own_activations_are_upstreams() -> None:
    from olmo import model

    for name, cls in (("swiglu", model.SwiGLU), ("gelu", model.GELU), ("relu", model.ReLU)):
        assert type(model.Activation.build(config(activation_type=name))) is cls


def test_an_unknown_name_is_refused() -> None:
    from olmo.model import OLMo

    with pytest.raises(PolycomError, match="unknown activation 'swiglue'"):
        OLMo(config(activation_type="swiglue"))


def test_a_saved_configuration_has_the_name(tmp_path: Any) -> None:
    from olmo.config import ActivationType, ModelConfig

    for name in ("polynorm-4", ActivationType.swiglu):
        config(activation_type=name).save(tmp_path / "config.yaml")
        assert f"activation_type: {name}\n" in (tmp_path / "config.yaml").read_text()
        assert ModelConfig.load(tmp_path / "config.yaml").activation_type == name


@pytest.mark.parametrize("block", ["sequential", "llama", "moe"])
@pytest.mark.parametrize("init_fn", ["normal", "mitchell", "full_megatron"])
def test_initialisation_reaches_the_coefficients_on_the_meta_device(block: str, init_fn: str) -> None:
    from olmo.model import OLMo

    settings = {"activation_type": "polyprelu", "block_type": block, "init_fn": init_fn}
    model = OLMo(config(init_device="meta", **settings)).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for layer in model.transformer.blocks:
        assert layer.act.weight.tolist() == pytest.approx([1 / 3] * 3)
        assert layer.act.bias.tolist() == [0]
        assert layer.act.slope.tolist() == [0.25]


def test_coefficients_are_right_when_reset_parameters_is_skipped() -> None:
    from olmo.model import OLMo

    model = OLMo(config(activation_type="polynorm", block_type="moe"), init_params=False)
    assert model.transformer.blocks[0].act.weight.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
@pytest.mark.parametrize("block", ["sequential", "moe"])
def test_coefficients_sit_in_the_group_without_weight_decay(block: str, decay_norm_and_bias: bool) -> None:
    from olmo.config import TrainConfig
    from olmo.model import OLMo
    from olmo.optim import get_param_groups

    settings = {"activation_type": "polynorm", "block_type": block, "include_bias": True}
    model = OLMo(config(moe_shared_expert=True, **settings))
    cfg = TrainConfig(model=model.config)
    cfg.optimizer.decay_norm_and_bias = decay_norm_and_bias
    wrapped = torch.nn.ModuleDict({"wrapper": model})  # names get longer, as under DDP
    decayed, undecayed = get_param_groups(cfg, wrapped)
    names = {f"wrapper.transformer.blocks.{i}.act.{n}" for i in range(2) for n in ("weight", "bias")}
    assert names <= set(undecayed["param_names"])
    assert undecayed["weight_decay"] == 0.0
    assert not any(".act." in name for name in decayed["param_names"])
    matrices = {name for name, p in wrapped.named_parameters() if p.dim() > 1 and "wte" not in name}
    assert matrices <= set(decayed["param_names"])
    assert len(decayed["params"]) + len(undecayed["params"]) == len(list(model.parameters()))


def test_fine_grained_activation_checkpointing_changes_nothing() -> None:
    from olmo.config import ActivationCheckpointingStrategy
    from olmo.model import OLMo

    tokens = torch.arange(16).view(1, 16)
    for block in ("sequential", "moe"):
        torch.manual_seed(0)
        model = OLMo(config(activation_type="polynorm", block_type=block, residual_dropout=0.0))
        model.config.attention_dropout = 0.0
        checkpointed = copy.deepcopy(model)
        checkpointed.set_activation_checkpointing(ActivationCheckpointingStrategy.fine_grained)
        for each in (model, checkpointed):
            each.transformer.emb_drop.p = 0.0
            each(tokens).logits.square().sum().backward()
        grads = zip(model.parameters(), checkpointed.parameters(), strict=True)
        assert all(torch.equal(p.grad, q.grad) for p, q in grads)


def test_a_dense_configuration_is_saved_without_the_fields_that_only_a_patched_olmo_knows(
    tmp_path: Any,
) -> None:
    from olmo.config import ModelConfig, TrainConfig

    for block, fields in (("sequential", 0), ("llama", 0), ("moe", 10)):
        one = config(block_type=block, moe_num_experts=5)
        one.save(tmp_path / "model.yaml")
        TrainConfig(model=one).save(tmp_path / "train.yaml")
        for name in ("model.yaml", "train.yaml"):
            assert (tmp_path / name).read_text().count("moe_") == fields
        assert ModelConfig.load(tmp_path / "model.yaml").moe_num_experts == (5 if fields else 8)
