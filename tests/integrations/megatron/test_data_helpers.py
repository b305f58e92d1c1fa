"""Megatron's compiled data helpers, on a Python that its wheel has none for."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from polycom_ext import upstream
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron import data_helpers, pretrain
from polycom_ext.integrations.megatron.data_helpers import compile_into
from polycom_ext.runs import entry


@pytest.mark.full
def test_they_are_compiled_for_this_python_without_a_makefile(tmp_path: Path) -> None:
    sources = upstream.ensure_applied("megatron") / "megatron" / "core" / "datasets"
    shutil.copy(sources / "helpers.cpp", tmp_path)
    compile_into(tmp_path)
    made = tmp_path / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert set(tmp_path.iterdir()) == {tmp_path / "helpers.cpp", made}
    spec = importlib.util.spec_from_file_location("helpers_cpp", made)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.build_sample_idx_int32)


def test_what_they_lack_is_said_in_a_sentence_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(PolycomError, match=r"^Megatron's data helpers must be compiled .*: \S+ failed: "):
        compile_into(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_they_are_looked_after_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel's tree has no Makefile there either."""

    class Reached(Exception):
        pass

    def reached() -> None:
        raise Reached

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(entry, "note_what_argparse_refuses", lambda: None)
    monkeypatch.setattr(data_helpers, "enable", reached)
    with pytest.raises(Reached):
        pretrain.main()
