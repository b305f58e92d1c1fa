"""A spec in Megatron's own terms: options, activation, widths, layout and data, checked before a start."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import pytest

from polycom_ext import upstream
from polycom_ext.activations import REGISTRY
from polycom_ext.cli import main
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron import blends
from polycom_ext.integrations.megatron.adapter import MegatronAdapter
from polycom_ext.runs import document, plan
from polycom_ext.runs.adapter import Needs
from polycom_ext.runs.site import Site
from polycom_ext.runs.spec import Spec, load_each

from .test_damage import save

TINY = Path(__file__).parents[3] / "configs" / "tiny"
DATA = ("data-path", "train-data-path", "valid-data-path", "test-data-path")
PER_TOKEN = {
    "processes": 2,
    "num_experts": 4,
    "tensor_model_parallel_size": 2,
    "calculate_per_token_loss": True,
}
KINDS = ("dense", "moe")


@pytest.fixture(scope="module", autouse=True)
def tree() -> Path:
    """The patched Megatron: its own argument parser says which options there are."""
    return upstream.ensure_applied("megatron")


def make(activation: str = "polynorm", processes: int = 1, width: int | None = 768, **options: Any) -> Spec:
    section: dict[str, Any] = {"num-layers": 4, "num-attention-heads": 4, "train-iters": 8}
    section |= {"save-interval": 4, "transformer-impl": "local"}
    section.update({key.replace("_", "-"): value for key, value in options.items()})
    section = {key: value for key, value in section.items() if value is not None}
    return Spec("run", "megatron", activation, width, processes, {}, section)


def arguments(spec: Spec) -> list[str]:
    return MegatronAdapter().arguments(spec, Path("/run"))


@pytest.mark.parametrize("name", REGISTRY)
def test_an_activation_is_asked_for_in_upstreams_way_where_it_has_one(name: str) -> None:
    entry = REGISTRY[name]
    spec = make(name)
    MegatronAdapter().validate(spec)
    given = arguments(spec)
    native = {"swiglu": ["--swiglu"], "gelu": [], "relu2": ["--squared-relu"]}
    if name in native:
        assert all(flag in given for flag in native[name])
        assert "--polycom-activation" not in given
    else:
        assert given[given.index("--polycom-activation") + 1] == name
        assert not {"--swiglu", "--squared-relu"} & set(given)
    assert given[given.index("--ffn-hidden-size") + 1] == ("512" if entry.gated else "768")


def test_upstream_s_activations_need_the_patches_for_what_only_these_offer() -> None:
    adapter, spec = MegatronAdapter(), make("swiglu", num_experts=4, moe_grouped_experts_in_norm=True)
    adapter.validate(spec)
    assert "--moe-grouped-experts-in-norm" in arguments(spec)
    assert adapter.needs_patches(spec)
    assert not adapter.needs_patches(make("swiglu", num_experts=4, moe_grouped_experts_in_norm=False))
    assert not adapter.needs_patches(make("swiglu", num_experts=4))


def test_an_order_reaches_the_trainer() -> None:
    given = arguments(make("polyrelu-4"))
    assert given[given.index("--polycom-activation") + 1] == "polyrelu-4"


def test_the_width_of_experts_follows_the_same_rule() -> None:
    given = arguments(make("swiglu", num_experts=4))
    assert given[given.index("--moe-ffn-hidden-size") + 1] == "512"
    assert "--moe-ffn-hidden-size" not in arguments(make("swiglu"))


def test_values_become_flags_lists_and_words() -> None:
    given = shlex.join(arguments(make(bf16=True, fp16=False, split=[99, 1], lr=2e-3, moe_layer_freq="[0]*2")))
    assert "--bf16 " in given
    assert "fp16 " not in given
    assert "--split 99 1 --lr 0.002 --moe-layer-freq '[0]*2'" in given


def test_a_value_reaches_upstream_as_it_was_written() -> None:
    texts = "010 1.10 2e-3 12e4567 1:30 no 2026-01-01 0x1F 1_000 .5 .inf -1e-3 -x".split()
    for text, word in zip(texts, [*texts[:-3], "inf", "-1e-3", "-x"], strict=True):
        given = shlex.join(arguments(make(tokenizer_model=document.load(text))))
        assert f"--tokenizer-model{'=' if word.startswith('-') else ' '}{word} " in given
    given = shlex.join(arguments(make(train_data_path=document.load("[030, a, 070, b]"))))
    assert "--train-data-path 030 a 070 b " in given


def test_a_run_saves_and_resumes_in_its_own_directory() -> None:
    given = shlex.join(arguments(make()))
    assert "--save /run/checkpoints --load /run/checkpoints --polycom-metrics /run/metrics.jsonl" in given
    assert given.startswith("-m polycom_ext.integrations.megatron.pretrain ")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_layer": 4}, "no option megatron.num-layer (did you mean 'num-layers'?)"),
        ({"lr_decay_stile": "cosine"}, "(did you mean 'lr-decay-style'?)"),
        ({"num_layers": "four"}, "megatron.num-layers must be an integer, not 'four'"),
        ({"num_layers": 4.5}, "megatron.num-layers must be an integer, not 4.5"),
        ({"lr": "fast"}, "megatron.lr must be a number, not 'fast'"),
        ({"lr": True}, "megatron.lr needs a value"),
        ({"lr": [1, 2]}, "megatron.lr takes one value, not a list"),
        ({"bf16": 1}, "megatron.bf16 is a flag: true or false, not 1"),
        ({"normalization": "RMS"}, "must be one of LayerNorm, RMSNorm, not 'RMS'"),
        ({"swiglu": True}, "megatron.swiglu cannot be set: name the activation with `activation:`"),
        ({"squared_relu": True}, "name the activation with `activation:`"),
        ({"polycom_activation": "relu"}, "with `activation:`"),
        ({"load": "elsewhere"}, "use pretrained-checkpoint"),
        ({"yaml_cfg": "a.yaml"}, "it would replace every option of the run"),
        ({"save": "elsewhere"}, "checkpoints go to the run directory"),
        ({"ffn_hidden_size": 512}, "give either ffn_width or megatron.ffn-hidden-size, not both"),
        ({"train_iters": None}, "must say how long to train"),
        ({"save_interval": None}, "must say how often to save"),
    ],
)
def test_a_wrong_option_is_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PolycomError) as error:
        MegatronAdapter().validate(make(**options))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("processes", "width", "options", "sentence"),
    [
        (
            2,
            769,
            {"tensor_model_parallel_size": 2},
            "tensor-model-parallel-size 2 does not divide the FFN width 769",
        ),
        (8, 768, {"tensor_model_parallel_size": 8}, "8 does not divide num-attention-heads 4"),
        (3, 768, {"pipeline_model_parallel_size": 3}, "size 3 does not divide num-layers 4"),
        (3, 768, {"tensor_model_parallel_size": 2}, "parallel size 2 does not divide processes 3"),
        (2, 768, {"context_parallel_size": 4}, "parallel size 4 does not divide processes 2"),
        (2, 768, {"expert_model_parallel_size": 2}, "needs megatron.num-experts"),
        (2, 768, {"expert_model_parallel_size": 2, "num_experts": 5}, "size 2 does not divide num-experts 5"),
        (
            2,
            768,
            {"expert_model_parallel_size": 2, "num_experts": 4, "tensor_model_parallel_size": 2},
            "expert-tensor x expert x pipeline parallel size 4 does not divide processes 2",
        ),
        (
            6,
            768,
            {"expert_tensor_parallel_size": 3, "num_experts": 6, "moe_ffn_hidden_size": 100, "width": None}
            | {"expert_model_parallel_size": 2},
            "expert-tensor-parallel-size 3 does not divide the experts' width 100",
        ),
        (
            2,
            768,
            {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "num_experts": 4},
            "expert-tensor-parallel-size 1 other than tensor-model-parallel-size 2 trains wrongly",
        ),
        (
            2,
            768,
            {"expert_tensor_parallel_size": 2, "num_experts": 4},
            "expert-tensor-parallel-size 2 other than tensor-model-parallel-size 1 trains wrongly",
        ),
        (2, 768, PER_TOKEN | {"moe_aux_loss_coeff": 0.01}, "weighs moe-aux-loss-coeff by 1 / tensor"),
        (2, 768, PER_TOKEN | {"moe_aux_loss_coeff": [0.0, 0.01]}, "weighs moe-aux-loss-coeff by 1 / tensor"),
        (2, 768, PER_TOKEN | {"moe_z_loss_coeff": 0.01}, "weighs moe-z-loss-coeff by 1 / tensor"),
        (1, 768, {"lr_warmup_iters": 8}, "lr-warmup-iters 8 must be less than train-iters 8"),
        (
            1,
            768,
            {"lr_warmup_iters": 5, "lr_decay_iters": 4},
            "lr-warmup-iters 5 must be less than lr-decay-iters 4",
        ),
        (
            1,
            768,
            {"lr_warmup_samples": 90, "train_samples": 80, "train_iters": None},
            "lr-warmup-samples 90 must be less than train-samples 80",
        ),
        (1, 768, {"lr_warmup_fraction": 1.0}, "lr-warmup-fraction 1.0 must be less than 1"),
        (
            2,
            768,
            {"micro_batch_size": 3, "global_batch_size": 16},
            "16 is not a multiple of micro-batch-size 3 times 2",
        ),
        (1, 768, {"tensor_model_parallel_size": 0}, "must be an integer of at least 1, not 0"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(
    processes: int, width: int, options: dict[str, Any], sentence: str
) -> None:
    spec = make(**{"processes": processes, "width": width, **options})
    with pytest.raises(PolycomError) as error:
        MegatronAdapter().validate(spec)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"processes": 4, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        {"processes": 3, "pipeline_model_parallel_size": 3, "decoder_first_pipeline_num_layers": 2},
        {"processes": 2, "expert_model_parallel_size": 2, "num_experts": 4},
        {
            "processes": 4,
            "tensor_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
            "expert_model_parallel_size": 2,
            "num_experts": 4,
        },
        {"processes": 4, "expert_tensor_parallel_size": 2, "expert_model_parallel_size": 2, "num_experts": 4},
        {"processes": 2, "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2, "num_experts": 4},
        {"processes": 2, "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
        {**PER_TOKEN, "moe_aux_loss_coeff": 0.0},
        {**PER_TOKEN, "moe_aux_loss_coeff": 0.01, "tensor_model_parallel_size": 1},
        {"lr_warmup_iters": 7},
        {"lr_warmup_iters": 9, "lr_decay_iters": 10},
        {"lr_warmup_iters": 0, "lr_warmup_fraction": 0.5},
        {"processes": 2, "micro_batch_size": 4, "global_batch_size": 16},
    ],
)
def test_a_layout_that_divides_is_accepted(options: dict[str, Any]) -> None:
    MegatronAdapter().validate(make(**options))


def test_a_layout_may_span_nodes() -> None:
    spec = replace(make(processes=2, tensor_model_parallel_size=4), nodes=2)
    MegatronAdapter().validate(spec)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"optimizer": "muon"}, "optimizer muon needs the package emerging-optimizers, 0.1 or later"),
        ({"optimizer": "dist_muon"}, "optimizer dist_muon needs the package emerging-optimizers, 0.1"),
        ({"optimizer": "lion"}, "optimizer lion needs the package emerging-optimizers, 0.2 or later"),
        (
            {"optimizer": "muon", "muon_scalar_optimizer": "lion"},
            "muon-scalar-optimizer lion needs the package emerging-optimizers, 0.2",
        ),
        ({"transformer_impl": None}, "layers are Transformer Engine's, which is not installed, unless"),
        ({"transformer_impl": "transformer_engine"}, "unless megatron.transformer-impl is local"),
        ({"use_precision_aware_optimizer": True}, "needs Transformer Engine's Adam, which is not installed"),
    ],
)
def test_what_needs_a_package_that_is_missing_is_refused_before_a_start_but_not_in_a_dry_run(
    options: dict[str, Any], sentence: str
) -> None:
    spec = make(mock_data=True, **options)
    MegatronAdapter().validate(spec)
    with pytest.raises(PolycomError, match=re.escape(sentence)):
        MegatronAdapter().check_inputs(spec)


def test_what_needs_a_package_that_is_there_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, version in (("emerging_optimizers", "0.2.1rc0"), ("transformer_engine", "2.9")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    for optimizer in ("muon", "lion", "adam"):
        options: dict[str, Any] = {
            "optimizer": optimizer,
            "use_precision_aware_optimizer": optimizer == "adam",
        }
        options["transformer_impl"] = None
        MegatronAdapter().check_inputs(make(mock_data=True, **options))


TE = "transformer_engine.pytorch"
CPU = {"distributed_backend": "gloo", "no_gradient_accumulation_fusion": True}
NCCL = "megatron.distributed-backend is nccl"
OF_TE = "Transformer Engine's layers run on GPUs only (megatron.transformer-impl is not local)"
ON_TE = {TE: "megatron.transformer-impl is not local"}
FUSED = "megatron.no-gradient-accumulation-fusion is not set"
ADAM = "megatron.use-precision-aware-optimizer takes its Adam"


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        (CPU, Needs()),
        (CPU | {"distributed_backend": "nccl"}, Needs(NCCL)),
        (CPU | {"distributed_backend": None}, Needs(NCCL)),
        (CPU | {"transformer_impl": "transformer_engine"}, Needs(OF_TE, ON_TE)),
        (CPU | {"transformer_impl": None, "distributed_backend": None}, Needs(OF_TE, ON_TE)),
        (
            CPU | {"no_gradient_accumulation_fusion": None},
            Needs(modules={"apex": FUSED, "fused_weight_gradient_mlp_cuda": f"it is of apex, and {FUSED}"}),
        ),
        (CPU | {"use_precision_aware_optimizer": True}, Needs(on_gpu={TE: ADAM})),
        (CPU | {"use_precision_aware_optimizer": True, "transformer_impl": None}, Needs(OF_TE, ON_TE)),
    ],
)
def test_what_a_run_needs_of_a_machine(options: dict[str, Any], needs: Needs) -> None:
    """To the letter, as doctor says it."""
    assert MegatronAdapter().needs(make(**options)) == needs


def test_token_files_must_be_there_weights_need_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = MegatronAdapter()
    spec = make(train_data_path=[0.3, "a", "0.7", "b"])
    for name in ("a.bin", "a.idx", "b.bin"):
        Path(name).touch()
    with pytest.raises(PolycomError, match=r"megatron\.train-data-path: b\.idx not found"):
        trainer.check_inputs(spec)
    for name in ("a", "b"):
        Path(f"{name}.bin").write_bytes(struct.pack("<3H", 5, 6, 7))
        header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 1, 2)
        Path(f"{name}.idx").write_bytes(header + struct.pack("<iqqq", 3, 0, 0, 1))
    trainer.check_inputs(spec)
    with pytest.raises(PolycomError, match=r"megatron\.data-path: c\.bin and c\.idx not found"):
        trainer.check_inputs(make(data_path="c"))
    with pytest.raises(PolycomError, match=r"megatron\.per-split-data-args-path: splits\.json not found"):
        trainer.check_inputs(make(per_split_data_args_path="splits.json"))


def upstreams_blend(tree: Path, **given: Any) -> Any:
    """What Megatron itself reads from its data options."""
    names = [*DATA, "data-args-path", "per-split-data-args-path"]
    options = {name.replace("-", "_"): given.get(name) for name in names}
    scope: dict[str, Any] = {
        "json": json,
        "open_file": open,
        "Optional": Optional,
        "List": list,
        "Tuple": tuple,
    }
    for file, name in [
        ("core/datasets/utils.py", "get_blend_from_list"),
        ("training/utils.py", "get_blend_and_blend_per_split"),
    ]:
        source = ast.parse((tree / "megatron" / file).read_text())
        [function] = [n for n in source.body if isinstance(n, ast.FunctionDef) and n.name == name]
        exec(ast.unparse(function), scope)
    return scope["get_blend_and_blend_per_split"](argparse.Namespace(**options))


@pytest.mark.parametrize(
    "blends",
    [
        {
            "data-path": document.load(
                "[" + ", ".join(f"0.{i:05}, corpus/part-{i}" for i in range(30000)) + "]"
            )
        },
        {"data-path": [f"corpus/part-{i}" for i in range(1275)]},
        {"train-data-path": ["train"] * 100, "valid-data-path": "valid"},
        {"train-data-path": "a", "valid-data-path": [1, "an odd name", 2, "b"] * 20, "test-data-path": "c"},
        {"data-path": ["a", "b"]},
        {"train-data-path": [1, "a", 2, "b"], "valid-data-path": "v"},
    ],
    ids=lambda blends: " ".join(f"{len(value)}-{name}" for name, value in blends.items()),
)
def test_a_blend_of_any_length_reaches_upstream_as_it_is(
    tree: Path, tmp_path: Path, blends: dict[str, Any]
) -> None:
    trainer, spec = MegatronAdapter(), make()
    spec.options.update(blends)
    trainer.validate(spec)
    for name, text in trainer.files(spec, tmp_path).items():
        (tmp_path / name).write_text(text)
    given = trainer.arguments(spec, tmp_path)
    assert sum(len(word) + 1 for word in given) < 4096
    parser = argparse.ArgumentParser()
    for name in DATA:
        parser.add_argument(f"--{name}", nargs="*")
    for name in ("data-args-path", "per-split-data-args-path"):
        parser.add_argument(f"--{name}")
    read = {name.replace("_", "-"): value for name, value in vars(parser.parse_known_args(given)[0]).items()}
    lists = {k: [str(word) for word in (v if isinstance(v, list) else [v])] for k, v in blends.items()}
    assert upstreams_blend(tree, **read) == upstreams_blend(tree, **lists)


def test_data_that_a_file_lists_are_the_runs_as_if_it_listed_them_itself(tmp_path: Path) -> None:
    blend = ["0.3", "a/one", "0.7", "a/two"]
    (tmp_path / "words").write_text(" ".join(blend))
    (tmp_path / "splits").write_text(json.dumps({"train": blend, "valid": ["b"], "test": None}))
    (tmp_path / "torn").write_text('{"train": [')
    said = {}
    for name in ("words", "splits", "torn"):
        spec = make()
        option = "data-args-path" if name == "words" else "per-split-data-args-path"
        spec.options[option] = str(tmp_path / name)
        said[name] = MegatronAdapter().facts(spec).data
    assert said == {"words": ("a/one", "a/two"), "splits": ("a/one", "a/two"), "torn": ()}


def test_a_path_that_upstream_would_take_for_two_is_refused() -> None:
    spec = make(data_path=["an odd name"] * 100)
    with pytest.raises(PolycomError, match="ends a path at white space: rename 'an odd name'"):
        MegatronAdapter().validate(spec)
    MegatronAdapter().validate(make(data_path=["an odd name"] * 3))


def test_data_is_never_invented_unasked() -> None:
    with pytest.raises(PolycomError, match="must name token files"):
        MegatronAdapter().check_inputs(make())
    MegatronAdapter().check_inputs(make(mock_data=True))


def test_a_missing_data_file_is_exit_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(TINY / "dense.yaml"), "--set", "activation=polynorm"]) == 2
    error = capfd.readouterr().err
    assert error.startswith(
        "polycom run: tiny-dense-polynorm: megatron.train-data-path: build/demo/train.bin and"
    )
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_fixes_the_model_tells_activation_order_and_shape_and_not_the_schedule() -> None:
    trainer = MegatronAdapter()
    base = trainer.model(make())
    assert trainer.model(make("polynorm-3", lr=1e-3, train_iters=9, bf16=True)) == base
    assert trainer.model(make("polynorm-4")) != base
    assert trainer.model(make("polyrelu")) != base
    assert trainer.model(make(num_layers=8)) != base
    assert trainer.model(make(width=384)) != base


def test_the_run_is_complete_at_its_last_iteration(tmp_path: Path) -> None:
    trainer, spec = MegatronAdapter(), make()
    assert trainer.latest_step(spec, tmp_path) is None
    assert not trainer.is_complete(spec, tmp_path)
    for step, complete in (("4", False), ("8", True), ("9", True)):
        save("torch_dist", tmp_path / "checkpoints" / f"iter_{int(step):07d}")
        (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(step)
        assert trainer.latest_step(spec, tmp_path) == int(step)
        assert trainer.is_complete(spec, tmp_path) is complete


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_spec_is_valid_and_says_where_its_numbers_come_from(kind: str) -> None:
    for spec in load_each(TINY / f"{kind}.yaml"):
        MegatronAdapter().validate(spec)
        assert spec.name == f"tiny-{kind}-{spec.activation}"
        assert spec.sources


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_specs_of_a_kind_differ_in_their_activation_only(kind: str) -> None:
    specs = load_each(TINY / f"{kind}.yaml")
    assert len(specs) >= 2
    alike = {json.dumps({**spec.as_mapping(), "name": "", "activation": ""}) for spec in specs}
    assert len(alike) == 1
    assert len({spec.activation for spec in specs}) == len(specs)
    for spec in specs:
        width, gated = spec.matched_ffn_width, spec.entry.gated
        assert width is not None
        assert spec.ffn_width is not None
        assert (3 if gated else 2) * width == 2 * spec.ffn_width, (
            "FFN parameters: 3 or 2 matrices of this width"
        )


def test_a_tracker_alone_is_no_start_from_scratch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.write_text("8")
    (run_dir / "metrics.jsonl").write_text("{}\n")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    options = ["--set", "megatron.train-data-path=null", "--set", "megatron.valid-data-path=null"]
    options += ["--set", "megatron.mock-data=true", "--output", str(run_dir)]
    assert main(["run", str(TINY / "dense.yaml"), "--set", "activation=polynorm", *options]) == 2
    error = capfd.readouterr().err
    assert f"{tracker} names iteration 8, whose folder is not there, and no checkpoint is there" in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_first_checkpoint_that_was_never_whole_is_none(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "iter_0000004"
    checkpoint.mkdir(parents=True)
    assert MegatronAdapter().latest_step(make(), tmp_path) is None
    [sentence] = MegatronAdapter().prepare_resume(make(), tmp_path)
    assert sentence.startswith(f"{checkpoint} lacks ")
    (tmp_path / "checkpoints" / "damaged" / "iter_0000004").rename(checkpoint)
    (checkpoint / ".metadata").touch()
    with pytest.raises(PolycomError, match=r"no checkpoint is whole: \S*iter_0000004 lacks metadata.json"):
        MegatronAdapter().latest_step(make(), tmp_path)


def test_what_is_no_folder_of_iterations_cannot_be_read_either(tmp_path: Path) -> None:
    assert MegatronAdapter().latest_step(make(), tmp_path) is None
    (tmp_path / "checkpoints").touch()
    with pytest.raises(PolycomError, match=r"cannot be read \(Not a directory\), and no checkpoint is there"):
        MegatronAdapter().latest_step(make(), tmp_path)


@pytest.mark.parametrize(
    "blend",
    ["a", "0.3 a 0.7 b", "a b", "2024", "a 1e5", "1e5 a", "30 a b", "30 a b c", "0.3 1 0.7 2", "30 70"],
)
def test_upstream_takes_the_same_words_of_a_blend_for_data_sets(tree: Path, blend: str) -> None:
    """A data set may have a number for its name."""
    (expected, _), _ = upstreams_blend(tree, **{"data-path": blend.split()})
    assert blends.prefixes(blend.split()) == expected


def test_a_tree_that_several_runs_share_is_brought_to_its_state_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of activations that need its patches; to compare a tree with its series takes hundreds of processes."""
    brought: list[str] = []
    monkeypatch.setattr(upstream, "ensure_applied", brought.append)
    specs = [spec for kind in KINDS for spec in load_each(TINY / f"{kind}.yaml")]
    plan.prepare_trees([plan.planned(spec, None, tmp_path, Site()) for spec in specs])
    assert brought == ["megatron"]
