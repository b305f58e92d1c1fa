"""Serves ranks of the Megatron training entry, or of a script beside this one; see forked_ranks.py.

Where POLYCOM_TE_SOURCES names an unpacked wheel of Transformer Engine, they find it over a stand-in for its
compiled module.
"""

import importlib
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from forked_ranks import serve

from polycom_ext.integrations.megatron import pretrain, rehearsal
from tests.integrations.transformer_engine import standin


def _entry(request: dict[str, Any]) -> None:
    if script := request.get("script"):
        sys.argv = [script, *request.get("arguments", [])]
        runpy.run_path(script, run_name="__main__")
        return
    sys.argv = ["pretrain", *request["arguments"]]
    pretrain.main()


def _main() -> None:
    sources = os.environ.get("POLYCOM_TE_SOURCES")
    if sources:
        standin.install(Path(sources))
        standin.without_driver()
    rehearsal.enable()
    rehearsal.enable = lambda: None  # done, for every rank that is forked from here
    if sources:
        standin.name_a_device()
        standin.gather_together()
    importlib.import_module("polycom_ext.integrations.megatron.gpt")
    # What a rank would import as it starts: tokenizers, and with them transformers, take most of its time.
    for name in (
        "megatron.core.tokenizers.text.models",
        "megatron.training.config",
        "polycom_ext.functional",
    ):
        importlib.import_module(name)
    writers: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    results_queue = writers.get_write_results_queue
    # Spawned, as upstream does it but for a persistent writer, it imports torch for each rank that saves.
    writers.get_write_results_queue = lambda mp_mode="fork": results_queue(mp_mode)
    serve(_entry)


if __name__ == "__main__":
    _main()
