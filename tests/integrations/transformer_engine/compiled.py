"""What only the real compiled module of Transformer Engine can say; run by `make test-te`, without a GPU."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest
import torch

from tests.integrations.transformer_engine import standin

torch.manual_seed(0)
te: Any = importlib.import_module("transformer_engine.pytorch")
tex: Any = importlib.import_module(standin.COMPILED)
standin.without_driver()
CONSTANTS = importlib.import_module("transformer_engine.pytorch.constants")


def test_this_is_no_stand_in() -> None:
    assert tex.__file__.endswith(".so")


@pytest.mark.parametrize("kind", standin.TYPES, ids=lambda kind: kind.__name__)
def test_the_stand_ins_types_have_the_members_of_the_real_ones(kind: Any) -> None:
    real = getattr(tex, kind.__name__)
    if hasattr(kind, "__members__"):
        assert {name: int(value) for name, value in real.__members__.items()} == {
            one.name: one.value for one in kind
        }
    else:
        assert set(vars(kind())) <= set(dir(real))


def positional(signature: str) -> list[str]:
    """Names of a pybind11 signature's parameters, in order."""
    inner = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    return re.findall(r"(?:^|, )(\w+): ", inner)


@pytest.mark.parametrize("function", standin.KERNELS, ids=lambda one: one.__name__)
def test_the_stand_ins_functions_take_what_the_real_ones_take(function: Any) -> None:
    real = positional(standin.REAL[function.__name__].__doc__.splitlines()[0])
    ours = inspect.signature(function).parameters.values()
    named = [one.name for one in ours if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert len(named) == len(real) or any(one.kind is one.VAR_POSITIONAL for one in ours)
    if not real[0].startswith("arg"):  # pybind11's name for one that has none
        assert named == real[: len(named)]
