"""YAML is read as it is written, and what was read is written so that it reads the same again."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from polycom_ext.runs import document
from polycom_ext.runs import spec as specs


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20", 20),
        ("0123", 123),
        ("-010", -10),
        ("1_000", 1000),
        ("1.10", 1.1),
        ("2e-3", 0.002),
        (".5", 0.5),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
    ],
)
def test_a_number_is_decimal_and_true_false_and_null_are_the_only_words(text: str, value: object) -> None:
    assert document.load(text) == value
    if not isinstance(value, bool) and value is not None:
        assert str(document.load(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *("yes no on off y n Yes NO 1:30 12:30:45 0x1F 0b1 0o17 2026-01-01 2026-01-01T10:00:00Z".split()),
        *("12e4567 1e-400 = nan inf 1e 1__0 _1 1.2.3".split()),
        "9" * 5000,
    ],
)
def test_everything_else_is_a_text(text: str) -> None:
    assert document.load(text) == text


def test_a_key_is_the_text_that_was_written() -> None:
    assert list(document.load("{010: a, on: b, ~: c, 1.10: d, 'x': e}")) == ["010", "on", "~", "1.10", "x"]


def test_mappings_still_merge() -> None:
    assert document.load("a: {b: {c: &a {010: b}}}\nd: {<<: *a}\n")["d"] == {"010": "b"}
    assert document.load("a: &a {b: 010, c: 2}\nd:\n  <<: *a\n  c: 3\n")["d"] == {"b": 10, "c": 3}


@pytest.mark.parametrize(
    "text", ["!!int 0x1F", "!!bool yes", "!!null x", "!!binary aGk=", "!!set {a}", "!a b"]
)
def test_a_tag_cannot_bring_the_other_readings_back(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        document.load(text)


def test_a_number_keeps_its_text_in_copies() -> None:
    for number in document.load("[010, 1.10]"):
        for copied in (copy.deepcopy(number), pickle.loads(pickle.dumps(number))):
            assert (copied, str(copied), type(copied)) == (number, str(number), type(number))


def as_written(value: Any) -> Any:
    """The value with the text of each scalar, which equality alone does not compare."""
    if isinstance(value, dict):
        return {key: as_written(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_written(inner) for inner in value]
    return type(value), str(value)


SCALARS = st.one_of(
    st.text("0123456789.eE+-_:xob ", min_size=1),
    st.sampled_from(
        "0123 1:30 1.10 2e-3 12e4567 yes no on off ~ null .inf 2026-01-01 = << true 0x1F 0b1".split()
    ),
    st.integers().map(str),
    st.floats(allow_nan=False).map(repr),
)
"""Plain scalars as a person may write them; for those that are none, the example is left out."""
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS),
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=5,
)


@example(
    ["0123", "1.10", "2e-3", "12e4567", "1:30", "no"], {"a": ["0123", "2e-3", "no", "1e5", "=", "<<", ""]}
)
@given(st.lists(SCALARS, max_size=5), st.dictionaries(TEXTS, VALUES, max_size=3))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_resolved_spec_reads_back_equal_through_its_file(
    tmp_path: Path, plain: list[str], values: dict[str, Any]
) -> None:
    try:
        scalars = [document.load(f"[{text}]")[0] for text in plain]
    except (yaml.YAMLError, IndexError):
        assume(False)
    options = {"scalars": scalars, **values}
    mapping = {"trainer": "megatron", "activation": "polynorm", "name": "x", "megatron": options}
    spec = specs.from_mapping(mapping, "x.yaml")
    path = tmp_path / "run.yaml"
    path.write_text(document.dump(spec.as_mapping()), encoding="utf-8")
    again = specs.load(path)
    assert again == spec
    assert as_written(again.as_mapping()) == as_written(spec.as_mapping())


def test_another_dumper_writes_the_numbers() -> None:
    assert yaml.safe_dump(document.load("[010, 1.10]")) == "- 10\n- 1.1\n"


def test_a_mapping_is_flattened_to_what_is_no_mapping() -> None:
    nested: dict[str, Any] = {"a": {"b": {"c": 1}, "d": [{"e": 2}]}, "f": {}, "g": None}
    assert document.flat(nested) == {"a.b.c": 1, "a.d": [{"e": 2}], "g": None}
    assert list(document.flat(nested, " ")) == ["a b c", "a d", "g"]
