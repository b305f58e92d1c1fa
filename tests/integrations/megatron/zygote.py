"""Serves ranks of the Megatron training entry, or of a script beside this one; see forked_ranks.py."""

import importlib
import runpy
import sys
from typing import Any

from forked_ranks import serve

from polycom_ext.integrations.megatron import pretrain, rehearsal


def _entry(request: dict[str, Any]) -> None:
    if script := request.get("script"):
        runpy.run_path(script, run_name="__main__")
        return
    sys.argv = ["pretrain", *request["arguments"]]
    pretrain.main()


if __name__ == "__main__":
    rehearsal.enable()
    rehearsal.enable = lambda: None  # done, for every rank that is forked from here
    importlib.import_module("polycom_ext.integrations.megatron.gpt")
    writers = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    results_queue = writers.get_write_results_queue
    # Spawned, as upstream does it but for a persistent writer, it imports torch for each rank that saves.
    writers.get_write_results_queue = lambda mp_mode="fork": results_queue(mp_mode)
    serve(_entry)
