"""The network between the nodes is measured, and the slow way is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from polycom_ext.cli import main
from polycom_ext.runs import preflight
from polycom_ext.runs.record import Record

from .test_nodes import RUN, on_two_nodes

NODES: preflight.Nodes = {rank: (f"gpu-{rank:02}", {}) for rank in range(3)}


def test_a_network_that_is_fast_enough_is_not_spoken_of() -> None:
    assert preflight.slow({"all_reduce": 20.0, "links": {}}, NODES, 20.0) == ""


def test_of_a_slow_network_the_slowest_way_is_named() -> None:
    measured = {"all_reduce": 3.14159, "links": {"0": 24.0, "1": 1.5}}
    assert preflight.slow(measured, NODES, 20.0) == (
        "the all-reduce over all processes reaches 3.14 GB/s, and preflight.bandwidth is 20; "
        "the slowest way is that from node 1 (gpu-01) to node 2 (gpu-02), 1.5 GB/s"
    )


@pytest.mark.full
def test_two_nodes_measure_their_network_and_refuse_a_slow_one(
    toy_spec: Callable[..., str], polycom: list[str]
) -> None:
    Path("site.yaml").write_text("preflight: {bandwidth: 100000}\n")
    assert main(["run", toy_spec(processes=2, steps=1), "--set", "nodes=2", "--site", "site.yaml"]) == 0
    first, second = on_two_nodes(polycom)
    measured = Record(RUN).read_bandwidth()
    assert 0.0 < measured["all_reduce"] < 100_000
    assert list(measured["links"]) == ["0"]
    sentence = f"the all-reduce over all processes reaches {measured['all_reduce']:.3g} GB/s"
    for node in (first, second):
        assert node.returncode == 2
        assert f"polycom node: small: {sentence}" in node.stderr
    Path("site.yaml").write_text("preflight: {bandwidth: 1.0e-6}\n")
    assert main(["run", "small.yaml", "--set", "nodes=2", "--site", "site.yaml"]) == 0
    assert [node.returncode for node in on_two_nodes(polycom)] == [0, 0]
    assert Record(RUN).read_bandwidth()["links"] == {}
