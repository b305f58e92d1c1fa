"""An OLMo spec in OLMo's own terms: options, activation, widths and data, checked before a start."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polycom_ext.activations import REGISTRY
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.olmo import options as olmo_options
from polycom_ext.integrations.olmo import tokens as olmo_tokens
from polycom_ext.integrations.olmo.adapter import OLMoAdapter
from polycom_ext.runs.adapter import Needs, trees
from polycom_ext.runs.spec import Spec, load, load_each

from .test_damage import save

TINY = Path(__file__).parents[3] / "configs" / "tiny"
KINDS = ("dense", "moe")


def make(activation: str = "polynorm", width: int | None = 768, processes: int = 1, **options: Any) -> Spec:
    return Spec(
        "run", "olmo", activation, width, processes, {}, {"max_duration": 8, "precision": "fp32", **options}
    )


def given(spec: Spec, run_dir: Path) -> Any:
    """The TrainConfig that the entry makes of the arguments and what a run writes into its directory."""
    from polycom_ext.integrations.olmo.train import parse

    for name, text in OLMoAdapter().files(spec, run_dir).items():
        (run_dir / name).write_text(text, encoding="utf-8")
    arguments = OLMoAdapter().arguments(spec, run_dir)
    assert arguments[:2] == ["-m", "polycom_ext.integrations.olmo.train"]
    assert max(map(len, arguments)) < 1000
    cfg, output = parse(arguments[2:])
    assert output == run_dir
    return cfg


@pytest.mark.parametrize("name", REGISTRY)
def test_activation_and_width_are_in_olmos_terms(name: str, olmo: None, tmp_path: Path) -> None:
    model = given(make(name), tmp_path).model
    assert model.activation_type == name
    assert model.mlp_hidden_size == (1024 if REGISTRY[name].gated else 768)


def test_options_reach_olmo_as_they_are(olmo: None, tmp_path: Path) -> None:
    datasets = {"c4_en-validation": ["/a b/part-0.npy"], "ice-validation": ["/c.npy"]}
    spec = make(
        "polynorm-4",
        model={"d_model": 64, "n_heads": 4, "rope": True, "n_kv_heads": None, "moe_zloss_weight": 1e-3},
        optimizer={"name": "adamw", "learning_rate": 4e-4, "betas": [0.9, 0.95]},
        data={"paths": ["/data/train.npy"], "drop_last": True},
        evaluators=[{"label": "all-small-ppl-validation", "data": {"datasets": datasets}}],
        distributed_strategy="fsdp",
        fsdp={"wrapping_strategy": "by_block", "sharding_strategy": "SHARD_GRAD_OP"},
        max_duration="1e9T",
        scheduler={"units": "tokens", "t_max": 5.0e12},
    )
    OLMoAdapter().validate(spec)
    cfg = given(spec, tmp_path)
    assert (cfg.run_name, cfg.save_folder) == ("run", str(tmp_path / "checkpoints"))
    assert (cfg.model.activation_type, cfg.model.mlp_hidden_size) == ("polynorm-4", 768)
    assert (cfg.model.rope, cfg.model.n_kv_heads, cfg.model.moe_zloss_weight) == (True, None, 1e-3)
    assert (str(cfg.optimizer.name), cfg.optimizer.learning_rate) == ("adamw", 4e-4)
    assert list(cfg.optimizer.betas) == [0.9, 0.95]
    assert dict(cfg.evaluators[0].data.datasets) == datasets
    assert cfg.fsdp.sharding_strategy.name == "SHARD_GRAD_OP"
    assert (cfg.max_duration, cfg.scheduler.t_max) == ("1e9T", 5e12)


@pytest.mark.parametrize("count", [1274, 5_200], ids=["the released OLMoE's", "more than OmegaConf reads"])
def test_a_list_of_data_files_may_be_longer_than_an_argument(olmo: None, tmp_path: Path, count: int) -> None:
    paths = [f"/data/{'x' * 110}/part-{i:05}-00000.npy" for i in range(count)]
    assert sum(map(len, paths)) > 128 * 1024
    labelled = {"c4_en-validation": paths}
    evaluators = [{"label": "all", "data": {"datasets": labelled}}]
    cfg = given(make(data={"paths": paths}, evaluators=evaluators), tmp_path)
    assert cfg.data.paths == paths
    assert cfg.evaluators[0].data.datasets == labelled


TEXTS = (
    *(
        "null",
        "true",
        "off",
        "0123",
        "1:30",
        "12e4567",
        "1e9",
        "1_000",
        "0x1f",
        ".5",
        "2024-01-01",
        "~",
        "",
        " a ",
    ),
    *("a: b", "#a", "- a", "a\nb", "ü", "\U0001f600", "a\\b", 'a"b', "%a", "@a", "=", "<<", "/a b/c,d.npy"),
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_a_text_whatever_it_looks_like(text: str, olmo: None, tmp_path: Path) -> None:
    cfg = given(make(data={"paths": [text], "datasets": {text: [text]}}), tmp_path)
    assert cfg.data.paths == [text]
    assert cfg.data.datasets == {text: [text]}


def test_a_number_is_what_was_written_and_a_text_that_looks_like_one_too(olmo: None, tmp_path: Path) -> None:
    numbers = "seed: 0123, precision: fp32, max_duration: 1_000, optimizer: {learning_rate: 2e-3, eps: .5e-8}"
    limits = "scheduler: {t_warmup: 010, t_max: 5e9}, max_grad_norm: .inf, stop_at: 0777"
    texts = "data: {paths: [010, 1.10, no, 2026-01-01], datasets: {010: [1e3]}}, wandb: {group: 1.10}"
    label = "evaluators: [{label: 007, data: {paths: [010]}}]"
    path = tmp_path / "run.yaml"
    path.write_text(f"trainer: olmo\nactivation: polynorm\nolmo: {{{numbers}, {limits}, {texts}, {label}}}\n")
    cfg = given(load(path), tmp_path)
    assert (cfg.seed, cfg.max_duration, cfg.stop_at, cfg.max_grad_norm) == (123, 1000, 777, float("inf"))
    assert OLMoAdapter().total_steps(load(path)) == 777
    assert OLMoAdapter().total_steps(load(path, ["olmo.stop_at=null"])) == 1000
    assert (cfg.optimizer.learning_rate, cfg.optimizer.eps) == (2e-3, 0.5e-8)
    assert (cfg.scheduler.t_warmup, cfg.scheduler.t_max) == (10, 5e9)
    assert cfg.data.paths == ["010", "1.10", "no", "2026-01-01"]
    assert cfg.data.datasets == {"010": ["1e3"]}
    assert cfg.wandb.group == "1.10"
    assert (cfg.evaluators[0].label, cfg.evaluators[0].data.paths) == ("007", ["010"])


def test_a_number_that_cannot_be_held_is_no_other_number(tree: Path) -> None:
    OLMoAdapter().validate(make(data={"paths": ["12e4567"]}, wandb={"group": "12e4567"}))
    for options in ({"optimizer": {"learning_rate": "12e4567"}}, {"optimizer": {"betas": [0.9, "1e-400"]}}):
        with pytest.raises(PolycomError, match="is a number that no float holds"):
            OLMoAdapter().validate(make(**options))


def test_a_specs_values_may_refer_as_olmos_do_and_the_runs_own_do_not(olmo: None, tmp_path: Path) -> None:
    (tmp_path / "here.npy").touch()
    run_dir = tmp_path / "a\\${run_name}"
    run_dir.mkdir()
    data = {"paths": ["${path.choose:/nowhere/a.npy,%s/here.npy}" % tmp_path]}  # noqa: UP031
    cfg = given(make(data=data, wandb={"name": "${run_name}"}), run_dir)
    assert cfg.data.paths == [str(tmp_path / "here.npy")]
    assert cfg.wandb.name == "run"
    assert cfg.save_folder == str(run_dir / "checkpoints")


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_specs_are_valid(kind: str, tree: Path) -> None:
    for spec in load_each(TINY / f"olmo-{kind}.yaml"):
        OLMoAdapter().validate(spec)
        assert spec.name == f"tiny-olmo-{kind}-{spec.activation}"
        assert OLMoAdapter().total_steps(spec)


def test_gated_and_ungated_tiny_models_have_equal_parameters(olmo: None, tmp_path: Path) -> None:
    from olmo.model import OLMo

    for kind in KINDS:
        specs = {spec.activation: spec for spec in load_each(TINY / f"olmo-{kind}.yaml")}
        counts = [
            OLMo(given(specs[activation], tmp_path).model).num_params()
            for activation in ("swiglu", "polynorm")
        ]
        assert counts[1] - counts[0] == 4 * 4, "four coefficients in each of four layers"


REFUSALS: dict[str, Spec] = {
    "OLMo has no option olmo.model.d_modle (did you mean 'model.d_model'?)": make(model={"d_modle": 4}),
    "OLMo has no option olmo.evaluator (did you mean 'evaluators'?)": make(evaluator=[]),
    "olmo.save_folder cannot be set": make(save_folder="x"),
    "olmo.model.activation_type cannot be set: name it with `activation:`": make(
        model={"activation_type": "gelu"}
    ),
    "give either ffn_width or olmo.model.mlp_hidden_size": make(model={"mlp_hidden_size": 4}),
    "not a multiple of 2 processes": make(processes=2, global_train_batch_size=3),
    "olmo.model must be a mapping": make(model=3),
}


@pytest.mark.parametrize("sentence", REFUSALS)
def test_what_cannot_be_right_is_refused_before_a_start(sentence: str, tree: Path) -> None:
    with pytest.raises(PolycomError) as refusal:
        OLMoAdapter().validate(REFUSALS[sentence])
    assert sentence in str(refusal.value)


def test_missing_token_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "here.npy").touch()
    evaluator = {"label": "ice", "data": {"datasets": {"ice-validation": [str(tmp_path / "gone.npy")]}}}
    spec = make(data={"paths": [str(tmp_path / "here.npy"), "s3://far/away.npy"]}, evaluators=[evaluator])
    with pytest.raises(PolycomError, match=r"evaluators: ice: .*gone\.npy not found"):
        OLMoAdapter().check_inputs(spec)
    with pytest.raises(PolycomError, match=r"data names no token files"):
        OLMoAdapter().check_inputs(make())
    OLMoAdapter().check_inputs(make(data={"paths": "${path.glob:/far/*.npy}"}))


SHAPES: dict[str, dict[str, Any]] = {
    "olmo.evaluators must be a list, not 3": {"evaluators": 3},
    "olmo.evaluators must be a mapping of names to values, not 'copa'": {"evaluators": ["copa"]},
    "olmo.data must be a mapping of names to values, not 'x.npy'": {"data": "x.npy"},
    "olmo.data: token files are a list, not 'x.npy'": {"data": {"paths": "x.npy"}},
    "olmo.data.datasets must be a mapping": {"data": {"datasets": ["x.npy"]}},
    "olmo.evaluators: ice must be a mapping": {
        "data": {"paths": ["${path.glob:*.npy}"]},
        "evaluators": [{"label": "ice", "data": 3}],
    },
    "olmo.evaluators: ice: token files are a list": {
        "data": {"paths": "${path.glob:*.npy}"},
        "evaluators": [{"label": "ice", "data": {"datasets": {"ice-validation": "x.npy"}}}],
    },
}


@pytest.mark.parametrize("sentence", SHAPES)
def test_data_of_another_shape_is_refused(sentence: str) -> None:
    with pytest.raises(PolycomError) as refusal:
        OLMoAdapter().check_inputs(make(**SHAPES[sentence]))
    assert sentence in str(refusal.value)


def test_a_run_is_complete_at_its_last_step_with_its_coefficients(tmp_path: Path) -> None:
    trainer, spec = OLMoAdapter(), make()
    assert trainer.latest_step(spec, tmp_path) is None
    save("torch_legacy", tmp_path / "checkpoints" / "step4")
    save("unsharded", tmp_path / "checkpoints" / "step8-unsharded")
    for step in ("step12-tmp", "latest"):
        (tmp_path / "checkpoints" / step).mkdir()
    assert trainer.latest_step(spec, tmp_path) == 8
    assert not trainer.is_complete(spec, tmp_path)
    (tmp_path / "coefficients.json").write_text(json.dumps({"step": 8}))
    assert trainer.is_complete(spec, tmp_path)
    assert trainer.is_complete(make("gelu"), tmp_path)
    assert not trainer.is_complete(make(max_duration=9), tmp_path)


def test_defaults_of_the_model_are_olmos(tree: Path, olmo: None) -> None:
    """Token files are compared with them where a spec says nothing."""
    from olmo.config import ModelConfig

    upstreams = ModelConfig()
    defaults = olmo_options.model_defaults(tree)
    assert set(olmo_tokens.FIELDS) <= defaults.keys()
    assert defaults == {name: getattr(upstreams, name) for name in defaults}


def test_length_in_tokens_counts_as_steps() -> None:
    spec = make(max_duration="1e3T", global_train_batch_size=4, model={"max_sequence_length": 16})
    assert OLMoAdapter().total_steps(spec) == 16
    for length in ("2ep", "2 epochs", "manyT", "T", "-3T"):
        model = {"max_sequence_length": 16}
        assert (
            OLMoAdapter().total_steps(make(max_duration=length, global_train_batch_size=4, model=model))
            is None
        )
    assert OLMoAdapter().total_steps(make(max_duration="2ep", stop_at=5)) == 5


def test_the_branch_has_its_own_trees(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("trainer: olmo\nupstream: olmo-moe\nactivation: polynorm\nolmo: {seed: 1}\n")
    spec = load(path)
    assert spec.options == {"seed": 1}
    assert trees(OLMoAdapter(), spec) == ("olmo-moe", "megablocks", "olmo")
    assert load(path, ["upstream=null"]).upstream == "olmo"
    assert trees(OLMoAdapter(), make()) == ("olmo",)
    with pytest.raises(PolycomError, match=r"has no upstream 'olmo-mo' \(did you mean 'olmo-moe'"):
        load(path, ["upstream=olmo-mo"])


def test_experts_of_the_branch_need_megablocks_kernels_on_gpus_only() -> None:
    kernels = {
        "stk": "megablocks takes its products from it",
        "megablocks_ops": "it is the compiled part of megablocks",
    }
    for version, block, wanted in (
        ("olmo-moe", "moe", Needs(on_gpu=kernels)),
        ("olmo-moe", "sequential", Needs()),
        ("olmo", "moe", Needs()),
    ):
        assert OLMoAdapter().needs(replace(make(model={"block_type": block}), upstream=version)) == wanted


def test_facts_of_a_spec() -> None:
    model = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_sequence_length": 32}
    experts = {"block_type": "moe", "moe_num_experts": 8, "moe_top_k": 2}
    paths = ["data/demo/part-0.npy", "data/demo/part-1.npy"]
    spec = make(width=96, model={**model, **experts}, global_train_batch_size=4, data={"paths": paths})
    found = OLMoAdapter().facts(spec)
    assert (found.layers, found.hidden, found.experts, found.active_experts) == (2, 64, 8, 2)
    assert found.tokens(10) == 10 * 4 * 32
    assert found.data == tuple(paths)
