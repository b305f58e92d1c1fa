"""How fast the processes of a run reduce over all of them: a program that torchrun starts before the trainer.

python -m polycom_ext.runs.bandwidth FILE --floor GB/S

The first process of node 0 writes FILE: `all_reduce`, the bus bandwidth in GB/s (10^9 bytes), that is
2 (n - 1) / n times the bytes that each of n processes reduces, by the seconds that the slowest takes. Where
that is below the floor, `links` has node -> GB/s from there to the next one, so that the slow one is found.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from polycom_ext.files import write_text
from polycom_ext.runs.rendering import NODE_RANK

BYTES = {"cuda": 1 << 28, "cpu": 1 << 23}
REPEATS = 5
PATIENCE = timedelta(seconds=60)


def main() -> None:
    """Measure, and write what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--floor", type=float, required=True)
    args = parser.parse_args()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    data = torch.ones(BYTES[kind] // 4, device=kind)
    count = dist.get_world_size()
    seconds = _slowest(_timed(lambda: dist.all_reduce(data), kind), kind)
    reached = 2 * (count - 1) / count * BYTES[kind] / seconds / 1e9
    links = _links(data, kind) if reached < args.floor else {}
    if os.environ[NODE_RANK] == "0" == os.environ["LOCAL_RANK"]:
        write_text(args.file, json.dumps({"all_reduce": reached, "links": links}))
    dist.destroy_process_group()


def _links(data: torch.Tensor, kind: str) -> dict[int, float]:
    """Node -> GB/s from its first process to that of the next node, one after the other."""
    own = (int(os.environ[NODE_RANK]), int(os.environ["LOCAL_RANK"]), dist.get_rank())
    places: list[tuple[int, int, int]] = [own] * dist.get_world_size()
    dist.all_gather_object(places, own)
    firsts = [rank for _, local, rank in sorted(places) if local == 0]
    found = {}
    for node, (source, target) in enumerate(pairwise(firsts)):
        seconds = 0.0
        if dist.get_rank() == source:
            seconds = _timed(lambda target=target: _send(data, target), kind)  # type: ignore[misc]
        elif dist.get_rank() == target:
            seconds = _timed(lambda source=source: _receive(data, source), kind)  # type: ignore[misc]
        found[node] = BYTES[kind] / _slowest(seconds, kind) / 1e9
    return found


def _send(data: torch.Tensor, target: int) -> None:
    dist.send(data, target)
    dist.recv(data[:1], target)  # it has come


def _receive(data: torch.Tensor, source: int) -> None:
    dist.recv(data, source)
    dist.send(data[:1], source)


def _timed(action: Callable[[], object], kind: str) -> float:
    """The median of several times, in seconds; the first is not counted, it connects."""
    times = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        action()
        if kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[1:])


def _slowest(seconds: float, kind: str) -> float:
    told = torch.tensor(seconds, dtype=torch.float64, device=kind)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return float(told)


if __name__ == "__main__":
    main()
