"""A spec inherits, is overridden, and is refused with one sentence when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from polycom_ext.errors import PolycomError
from polycom_ext.runs import spec as specs

MINIMAL = "trainer: megatron\nactivation: polynorm\n"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_name_is_the_files_unless_it_is_given(tmp_path: Path) -> None:
    assert specs.load(write(tmp_path, "some-run.yaml", MINIMAL)).name == "some-run"
    assert specs.load(write(tmp_path, "b.yaml", MINIMAL + "name: given\n")).name == "given"


def test_extends_merges_mappings_replaces_values_and_null_deletes(tmp_path: Path) -> None:
    write(
        tmp_path, "shared/root.yaml", "trainer: megatron\nmegatron: {seed: 1, bf16: true, split: [90, 10]}\n"
    )
    write(tmp_path, "base.yaml", "extends: shared/root.yaml\nprocesses_per_node: 4\nmegatron: {seed: 2}\n")
    path = write(
        tmp_path,
        "run.yaml",
        "extends: base.yaml\nactivation: gelu\nprocesses_per_node: null\n"
        "megatron: {bf16: null, split: [1], lr: 2e-3}\n",
    )
    spec = specs.load(path)
    assert spec.processes_per_node == 1
    assert spec.options == {"seed": 2, "split": [1], "lr": 0.002}


def test_a_null_that_deletes_nothing_is_no_value(tmp_path: Path) -> None:
    spec = specs.load(write(tmp_path, "run.yaml", MINIMAL + "megatron: {bf16: null, seed: 1}\n"))
    assert spec.options == {"seed": 1}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("megatron.train-iters=20", {"seed": 1, "train-iters": 20}),
        ("megatron.lr=2e-3", {"seed": 1, "lr": 0.002}),
        ("megatron.bf16=true", {"seed": 1, "bf16": True}),
        ("megatron.data-path=[0.5, a, 0.5, b]", {"seed": 1, "data-path": [0.5, "a", 0.5, "b"]}),
        ("megatron.tokenizer-model=a=b.model", {"seed": 1, "tokenizer-model": "a=b.model"}),
        ("megatron.seed=null", {}),
        ("megatron.seed=", {}),
    ],
)
def test_set_takes_dotted_keys_and_yaml_values(
    tmp_path: Path, override: str, expected: dict[str, object]
) -> None:
    path = write(tmp_path, "run.yaml", MINIMAL + "megatron: {seed: 1}\n")
    assert specs.load(path, [override]).options == expected


def test_overrides_apply_in_order_and_may_change_the_activation(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", MINIMAL + "ffn_width: 768\n")
    spec = specs.load(path, ["activation=relu", "activation=swiglu", "name=other"])
    assert (spec.name, spec.activation, spec.matched_ffn_width) == ("other", "swiglu", 512)


def test_a_variable_and_a_name_are_the_text_that_was_written(tmp_path: Path) -> None:
    variables = (
        "A: 010, B: 12:30:45, C: 1.10, D: no, E: 2026-01-01, F: 12e4567, G: 0x1F, H: 1_0, I: .inf, J: ''"
    )
    path = write(tmp_path, "run.yaml", MINIMAL + f"name: 010\nenvironment: {{{variables}}}\n")
    spec = specs.load(path, ["environment.K=010", "environment.A=0777"])
    assert spec.name == "010"
    assert " ".join(f"{name}={value}" for name, value in spec.environment.items()) == (
        "A=0777 B=12:30:45 C=1.10 D=no E=2026-01-01 F=12e4567 G=0x1F H=1_0 I=.inf J= K=010"
    )


def test_a_count_is_decimal(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", MINIMAL + "processes_per_node: 010\nffn_width: 1_536\n")
    spec = specs.load(path)
    assert (spec.processes_per_node, spec.ffn_width) == (10, 1536)


def test_the_world_is_the_processes_of_all_nodes(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", MINIMAL + "nodes: 3\nprocesses_per_node: 8\n")
    assert specs.load(path).world_size == 24
    with pytest.raises(
        PolycomError, match=r"unknown key 'processes' \(did you mean 'processes_per_node'\?\)"
    ):
        specs.load(path, ["processes=8"])


def test_a_resolved_spec_reads_back_equal(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "run.yaml",
        MINIMAL + "ffn_width: 96\nprocesses_per_node: 2\nenvironment: {OMP_NUM_THREADS: 1}\n"
        "megatron: {seed: 1, data-path: [a, b]}\nsources: {seed: our choice}\n",
    )
    spec = specs.load(path)
    assert specs.from_mapping(spec.as_mapping(), "run.yaml") == spec


@pytest.mark.parametrize(("activation", "width"), [("swiglu", 512), ("gelu", 768), ("polynorm", 768)])
def test_a_gated_activation_gets_two_thirds_of_the_width(tmp_path: Path, activation: str, width: int) -> None:
    path = write(tmp_path, "run.yaml", f"trainer: megatron\nactivation: {activation}\nffn_width: 768\n")
    assert specs.load(path).matched_ffn_width == width


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("activation: polynorm\n", "run.yaml has no `trainer:`"),
        ("trainer: megatron\n", "run.yaml has no `activation:`"),
        (MINIMAL + "proceses: 2\n", "unknown key 'proceses' (did you mean 'processes_per_node'?)"),
        (MINIMAL + "olmo: {a: 1}\n", "unknown key 'olmo'"),
        ("trainer: megatron\nactivation: polynrom\n", "unknown activation 'polynrom'"),
        ("trainer: megatron\nactivation: gelu-3\n", "has no polynomial"),
        ("trainer: megatron\nactivation: [gelu]\n", "activation must be a text"),
        (
            MINIMAL + "processes_per_node: two\n",
            "processes_per_node must be an integer of at least 1, not 'two'",
        ),
        (
            MINIMAL + "processes_per_node: true\n",
            "processes_per_node must be an integer of at least 1, not True",
        ),
        (MINIMAL + "ffn_width: 0\n", "ffn_width must be an integer of at least 1, not 0"),
        (MINIMAL + "environment: {A: true}\n", "environment.A must be a text or a number"),
        (MINIMAL + "megatron: [a]\n", "megatron must be a mapping"),
        (MINIMAL + "name: ../escape\n", "must be a plain folder name"),
        (MINIMAL + "megatron: {seed: 1, seed: 2}\n", "line 3: key 'seed' is given twice"),
        (MINIMAL + "megatron: {seed: [}\n", "is not valid YAML: line 3"),
        (MINIMAL + "extends: [a, b]\n", "extends must be the name of one file"),
        ("just text\n", "must be a mapping"),
        (
            MINIMAL + "processes_per_node: 1:30\n",
            "processes_per_node must be an integer of at least 1, not '1:30'",
        ),
        (
            MINIMAL + "processes_per_node: 0x10\n",
            "processes_per_node must be an integer of at least 1, not '0x10'",
        ),
        (MINIMAL + "processes_per_node: !!int 0x10\n", "line 3: '0x10' is not of type int"),
        (MINIMAL + "megatron: {seed: !!timestamp 2026-01-01}\n", "a spec has nothing of type"),
        (MINIMAL + "environment: {A=B: c}\n", "environment: 'A=B' is no name of a variable"),
        (MINIMAL + "environment: {'': c}\n", "environment: '' is no name of a variable"),
        (MINIMAL + "environment: {2A: c}\n", "environment: '2A' is no name of a variable"),
        (MINIMAL + 'environment: {"A\\0": c}\n', "'A\\x00' is a key, a character that no file"),
        (MINIMAL + 'environment: {A: "b\\0c"}\n', "environment.A holds 'b\\x00c', a character that no file"),
        (MINIMAL + 'megatron: {a: ["b\\0"]}\n', "megatron.a holds 'b\\x00'"),
        (MINIMAL + 'megatron: {a: "\\ud800"}\n', "megatron.a holds '\\ud800'"),
        (MINIMAL + 'name: "a\\0"\n', "name holds 'a\\x00'"),
        (MINIMAL + 'extends: "a\\0"\n', "extends must be the name of one file"),
        (MINIMAL + "megatron: &a {b: *a}\n", "holds an anchor within itself"),
        (MINIMAL + "sources: &a [*a]\n", "holds an anchor within itself"),
        ("trainer: megatron\nactivation: swiglu\nffn_width: 100\n", "ffn_width 100 has no exact 2/3"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = write(tmp_path, "run.yaml", text)
    with pytest.raises(PolycomError) as error:
        specs.load(path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override", ["megatron.seed", "=1", "megatron..seed=1", "extends=other.yaml", "a=[1"]
)
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    path = write(tmp_path, "run.yaml", MINIMAL)
    with pytest.raises(PolycomError, match="--set"):
        specs.load(path, [override])


def test_a_cycle_is_named_link_by_link(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    write(tmp_path, "b.yaml", "extends: c.yaml\n")
    write(tmp_path, "c.yaml", "extends: b.yaml\n")
    with pytest.raises(PolycomError, match=r"extends itself: b\.yaml -> c\.yaml -> b\.yaml"):
        specs.load(tmp_path / "a.yaml")


def test_a_missing_file_is_named_with_who_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(PolycomError, match=r"nowhere\.yaml does not exist"):
        specs.load(tmp_path / "nowhere.yaml")
    path = write(tmp_path, "run.yaml", "extends: gone.yaml\n")
    with pytest.raises(PolycomError, match=r"gone\.yaml, which .*run\.yaml extends, does not exist"):
        specs.load(path)


COMPARISON = "trainer: megatron\nname: base\neach: {activation: [gelu, polynorm-2]}\n"


def test_a_comparison_is_a_run_for_each_value_named_after_it(tmp_path: Path) -> None:
    path = write(tmp_path, "comparison.yaml", COMPARISON)
    of_file = [(spec.name, spec.activation) for spec in specs.load_each(path)]
    assert of_file == [("base-gelu", "gelu"), ("base-polynorm-2", "polynorm-2")]
    given = specs.load_each(path, ["activation=relu"], ["megatron.seed=1,2", "nodes=1,2"])
    assert [(spec.name, spec.options["seed"], spec.nodes) for spec in given] == [
        ("base-1-1", 1, 1),
        ("base-1-2", 1, 2),
        ("base-2-1", 2, 1),
        ("base-2-2", 2, 2),
    ]


def test_one_run_of_a_comparison_has_the_name_that_it_has_among_all(tmp_path: Path) -> None:
    path = write(tmp_path, "comparison.yaml", COMPARISON)
    assert specs.load(path, ["activation=polynorm-2"]) == specs.load_each(path)[1]
    with pytest.raises(PolycomError, match=r"is a comparison of base-gelu, base-polynorm-2: choose one"):
        specs.load(path)


def test_a_plain_spec_is_one_run(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", MINIMAL)
    assert specs.load_each(path) == [specs.load(path)]
    [named] = specs.load_each(path, each=["activation=relu"])
    assert named.name == "run-relu"


@pytest.mark.parametrize("each", ["activation", "activation=", "activation=a,,b", "=a", "a..b=1"])
def test_each_that_has_no_values_is_refused(tmp_path: Path, each: str) -> None:
    with pytest.raises(PolycomError, match=r"--each .* must have the form key=a,b,c"):
        specs.load_each(write(tmp_path, "run.yaml", MINIMAL), each=[each])


@pytest.mark.parametrize("values", ["[]", "gelu", "[{a: 1}]", "[true]"])
def test_a_comparison_of_nothing_is_refused(tmp_path: Path, values: str) -> None:
    path = write(tmp_path, "run.yaml", MINIMAL + f"each: {{activation: {values}}}\n")
    with pytest.raises(PolycomError, match=r"each\.activation must be a list of texts or numbers"):
        specs.load_each(path)


def test_one_value_is_set_of_what_is_compared_not_several(tmp_path: Path) -> None:
    path = write(tmp_path, "comparison.yaml", MINIMAL + "each: {megatron.seed: [1, 2]}\n")
    assert specs.load(path, ["megatron.seed=3"]).name == "comparison-3"
    with pytest.raises(PolycomError, match="name 'comparison-3,4' must be a plain folder name"):
        specs.load_each(path, ["megatron.seed=3,4"])


@pytest.mark.parametrize("name", ["true", "{a: 1}", "[a]", "''"])
def test_a_name_that_is_no_text_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PolycomError, match="name must be a text"):
        specs.load(write(tmp_path, "run.yaml", MINIMAL + f"name: {name}\n"))
