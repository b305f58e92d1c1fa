"""What Megatron's own parser knows, asked once a commit of the right tree; and which of it makes a model."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import polycom_ext
from polycom_ext import upstream
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron import model as megatron_model
from polycom_ext.integrations.megatron import options as megatron_options
from polycom_ext.integrations.megatron.adapter import MegatronAdapter
from polycom_ext.runs import document
from polycom_ext.runs.adapter import Upstream, trees
from polycom_ext.runs.spec import Spec

PARSER = """
def add_megatron_arguments(parser):
    parser.add_argument("--norm-epsilon", dest="layernorm_epsilon", type=float, default=1e-5)
    parser.add_argument("--a-field-of-tomorrow", type=int, default=3)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--lr", type=float)

def core_transformer_config_from_args(args):
    return args.layernorm_epsilon
"""
CONFIGS = """
from dataclasses import dataclass

@dataclass
class ModelParallelConfig:
    tensor_model_parallel_size: int = 1

@dataclass
class MLATransformerConfig(ModelParallelConfig):
    layernorm_epsilon: float = 1e-5
    a_field_of_tomorrow: int = 3
"""


@pytest.fixture(scope="module")
def tree() -> Path:
    return upstream.ensure_applied("megatron")


@pytest.fixture(scope="module")
def known(tree: Path) -> dict[str, megatron_options.Option]:
    return megatron_options.known(tree)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with a parser of four options and two classes of configuration, and the cache of its answer."""
    tree = tmp_path_factory.mktemp("asked") / "megatron"
    for name, text in {
        "training/arguments.py": PARSER,
        "core/model_parallel_config.py": CONFIGS,
        "core/transformer/transformer_config.py": CONFIGS,
    }.items():
        path = tree / "megatron" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    commit(tree)
    megatron_options.known(tree)
    return tree


@pytest.fixture
def small(asked: Path, tmp_path: Path) -> Path:
    """A copy of both."""
    return Path(shutil.copytree(asked.parent, tmp_path / "trees")) / "megatron"


def commit(tree: Path) -> None:
    git = ["git", "-C", str(tree), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "tree"]):
        subprocess.run([*git, *command], check=True)


def only_cache(tree: Path) -> Path:
    [cache] = tree.parent.glob(".options-*")
    return cache


def forget() -> None:
    """As if another process asked."""
    megatron_options._known.cache_clear()


def test_a_tree_is_asked_once_a_commit(small: Path) -> None:
    cache = only_cache(small)
    cache.write_text(cache.read_text().replace('"lr"', '"from-the-cache"'))
    assert "from-the-cache" in megatron_options.known(small)
    (small / "megatron/training/arguments.py").write_text(PARSER.replace("--lr", "--rate"))
    assert "rate" in megatron_options.known(small)
    assert only_cache(small) == cache, "an edited tree is no commit's"
    commit(small)
    assert "rate" in megatron_options.known(small)
    assert len(list(small.parent.glob(".options-*"))) == 2


def test_a_torn_cache_is_made_again(small: Path) -> None:
    cache = only_cache(small)
    whole = cache.read_text()
    cache.write_text(whole[:100])
    assert "lr" in megatron_options.known(small)
    assert cache.read_text() == whole


@pytest.mark.parametrize(
    "content", ["", '{"lr": {"kind": "int"}}', "[]", "{}", '{"lr": 1}', "\x00", "\udcff"]
)
def test_no_content_of_a_cache_is_taken_for_an_answer(
    small: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    whole = only_cache(small).read_text()
    monkeypatch.setattr(megatron_options, "_ask", lambda tree: whole)
    only_cache(small).write_bytes(content.encode(errors="surrogateescape"))
    assert "lr" in megatron_options.known(small)


def test_a_cache_that_cannot_be_written_is_done_without(small: Path) -> None:
    cache = only_cache(small)
    cache.unlink()
    cache.with_name(f".{cache.name}.{os.getpid()}.partial").mkdir()  # in the way, even of root
    assert "lr" in megatron_options.known(small)
    assert list(small.parent.glob(".options-*")) == []


def test_the_commit_is_the_trees_whatever_git_is_told_by_the_environment(
    small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").touch()
    commit(other)
    cache = only_cache(small)
    cache.write_text(cache.read_text().replace('"lr"', '"of-the-right-commit"'))
    for where in (other, tmp_path / "nowhere"):
        monkeypatch.setenv("GIT_DIR", str(where / ".git"))
        monkeypatch.setenv("GIT_WORK_TREE", str(where))
        forget()
        assert "of-the-right-commit" in megatron_options.known(small)
        assert only_cache(small) == cache


def test_a_tree_without_git_is_asked_all_the_same(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_cache(small).unlink()
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "lr" in megatron_options.known(small)
    assert list(small.parent.glob(".options-*")) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_tree_that_another_user_owns_has_its_commit(small: Path) -> None:
    for path in [small, *small.rglob("*")]:
        os.chown(path, 12345, 12345)
    cache = only_cache(small)
    cache.write_text(cache.read_text().replace('"lr"', '"of-its-commit"'))
    assert "of-its-commit" in megatron_options.known(small)


def test_a_tree_whose_parser_cannot_be_imported_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "megatron"
    (broken / "megatron" / "training").mkdir(parents=True)
    (broken / "megatron" / "training" / "arguments.py").write_text("import a_package_that_is_not_there\n")
    commit(broken)
    with pytest.raises(PolycomError, match="No module named 'a_package_that_is_not_there'"):
        megatron_options.known(broken)


def test_the_options_are_those_of_the_version_that_a_spec_names(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = (pinned := upstream.pins.patches_dir() / "pins.toml").read_text()
    patches = tmp_path / "patches"
    patches.mkdir()
    [table] = re.findall(r"^\[megatron\]$.*?(?=^\[olmo\])", pins, re.DOTALL | re.MULTILINE)
    (patches / pinned.name).write_text(table + table.replace("[megatron", "[megatron-next"))
    shutil.copytree(small, small.with_name("megatron-next"))
    for name in ("training/arguments.py", "core/transformer/transformer_config.py"):
        path = small.with_name("megatron-next") / "megatron" / name
        path.write_text(
            path.read_text().replace("of-tomorrow", "of-today").replace("of_tomorrow", "of_today")
        )
    monkeypatch.setenv("POLYCOM_PATCHES", str(patches))
    monkeypatch.setenv("POLYCOM_UPSTREAM_DIR", str(small.parent))
    versions = {name: Upstream(name, (name,)) for name in ("megatron", "megatron-next")}
    monkeypatch.setattr(MegatronAdapter, "upstreams", versions)
    adapter, field = MegatronAdapter(), "a-field-of-today"
    first, following = (
        Spec("run", "megatron", "gelu", None, 1, {}, {field: 5}, upstream=name)
        for name in (None, "megatron-next")
    )
    assert trees(adapter, first) == ("megatron",)
    with pytest.raises(PolycomError, match="has no option megatron\\.a-field-of-today"):
        adapter.validate(first)
    with pytest.raises(PolycomError, match="how long to train"):  # what is looked at next
        adapter.validate(following)
    assert adapter.model(following)["megatron.a-field-of-today"] == 5


def test_options_are_described_as_upstream_has_them(known: dict[str, megatron_options.Option]) -> None:
    assert known["polycom-activation"].takes_value
    assert known["bf16"] == megatron_options.Option(
        False, False, False, "any", None, "bf16", False, True, False
    )
    assert known["attention-backend"].problem("flash") is None
    assert "inference-wandb-logging" in known
    assert "no-inference-wandb-logging" not in known


def model(activation: str = "gelu", **options: Any) -> dict[str, Any]:
    section = {"num-layers": 4, **{key.replace("_", "-"): value for key, value in options.items()}}
    return MegatronAdapter().model(Spec("run", "megatron", activation, None, 1, {}, section))


@pytest.mark.parametrize(
    "options",
    [
        {"norm_epsilon": 1e-6},
        {"rotary_interleaved": True},
        {"use_rope_scaling": True},
        {"moe_router_pre_softmax": True},
        {"moe_router_score_function": "sigmoid"},
        {"moe_expert_capacity_factor": 1.0},
        {"rotary_base": 500000},
        {"rotary_percent": 0.5},
        {"disable_bias_linear": True},
        {"window_size": "128,0"},
        {"kv_lora_rank": 64},
        {"group_query_attention": True},
        {"tokenizer_model": "other.json"},
        {"vocab_size": 99},
        {"make_vocab_size_divisible_by": 1},
        {"heterogeneous_layers_config_path": "layers.json"},
        {"spec": ["module", "name"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_changes_the_function_makes_another_model(tree: Path, options: dict[str, Any]) -> None:
    [name] = options
    assert set(model(**options)) - set(model()) == {f"megatron.{name.replace('_', '-')}"}


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
        {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": True},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"bf16": True, "fp8_format": "hybrid", "attention_softmax_in_fp32": True},
        {"transformer_impl": "local", "no_rope_fusion": True, "no_masked_softmax_fusion": True},
        {"hidden_dropout": 0.0, "attention_dropout": 0.0, "moe_aux_loss_coeff": 0.1, "seed": 7},
        {"init_method_std": 0.1, "lr": 1e-3, "train_iters": 9, "data_path": "elsewhere"},
        {"norm_epsilon": "1E-5", "rotary_base": 10000, "moe_layer_freq": "1", "disable_bias_linear": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_changes_how_it_is_computed_or_trained_does_not(tree: Path, options: dict[str, Any]) -> None:
    assert model(**options) == model()


def test_another_name_or_another_way_to_write_a_value_is_no_change(tree: Path) -> None:
    assert model(norm_epsilon=1e-6) == model(norm_epsilon=document.load("0.1e-5"))
    assert model(vocab_size=100) == model(vocab_size=document.load("0100"))
    assert model(tokenizer_model=document.load("1.10")) != model(tokenizer_model=document.load("1.1"))


def test_a_field_that_nobody_knows_yet_counts(small: Path) -> None:
    known = megatron_options.known(small)
    options = {"a-field-of-tomorrow": 4, "tensor-model-parallel-size": 2, "lr": 1}
    assert megatron_model.fixed(options, known) == {"a-field-of-tomorrow": 4}
    assert megatron_model.fixed({"a-field-of-tomorrow": 3}, known) == {}


def test_every_harmless_option_exists_and_would_count_otherwise(
    known: dict[str, megatron_options.Option],
) -> None:
    harmless = [name for names in megatron_model.HARMLESS.values() for name in names.split()]
    assert [name for name in harmless if name not in known] == []
    assert [name for name in harmless if not known[name].of_model] == []
    assert len(harmless) == len(set(harmless))


def test_what_our_own_entry_builds_a_model_from_is_judged(known: dict[str, megatron_options.Option]) -> None:
    source = Path(polycom_ext.__file__).parent / "integrations" / "megatron" / "gpt.py"
    build = next(
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "build_model"
    )
    read = {
        node.attr
        for node in ast.walk(build)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "args"
    }
    judged = {option.dest for option in known.values() if option.of_model}
    judged |= {known[name].dest for name in megatron_model.ELSEWHERE}
    assert read - judged == {"fp16_lm_cross_entropy"}, "a precision"


def test_every_group_of_options_that_describes_the_model_is_upstreams(tree: Path) -> None:
    source = (tree / "megatron" / "training" / "arguments.py").read_text()
    titles = {
        keyword.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument_group")
        for keyword in node.keywords
        if keyword.arg == "title" and isinstance(keyword.value, ast.Constant)
    }
    assert set(megatron_options.ARCHITECTURE) <= titles


def test_numbers_are_checked_as_they_were_written(known: dict[str, megatron_options.Option]) -> None:
    def problem(name: str, text: str) -> str | None:
        return known[name].problem(document.load(text))

    for name, text in [
        ("seed", "0123"),
        ("lr", "2e-3"),
        ("lr", ".inf"),
        ("seed", "1_000"),
        ("split", "1:30"),
    ]:
        assert problem(name, text) is None
    assert problem("seed", "1:30") == "must be an integer, not '1:30'"
    assert problem("seed", "0x1F") == "must be an integer, not '0x1F'"
    assert problem("lr", "12e4567") == "must be a number, not '12e4567'"
    assert problem("lr", "1e-400") == "must be a number, not '1e-400'"
    assert problem("bf16", "yes") == "is a flag: true or false, not 'yes'"
    assert problem("data-path", "[a, null]") == "takes texts and numbers, not None: quote it"
    assert problem("data-path", "[true]") == "takes texts and numbers, not True: quote it"
    assert problem("tokenizer-model", "{a: b}") == "takes texts and numbers, not {'a': 'b'}: quote it"
    assert json.loads(json.dumps(known["cp-comm-type"].default)) == ["p2p"]
