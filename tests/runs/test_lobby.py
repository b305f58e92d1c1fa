"""The nodes of a run find together, end together, and say which of them was the cause."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from polycom_ext.errors import PolycomError
from polycom_ext.runs import launch, lobby
from polycom_ext.runs.launch import Ending
from polycom_ext.runs.lobby import DONE, FAILED, REFUSED, End, Entry, Parted, Stopped, Verdict, host
from polycom_ext.runs.lobby.guest import Guest
from polycom_ext.runs.lobby.host import Host
from polycom_ext.runs.lobby.network import Address, free_port, interface_of
from polycom_ext.runs.wishes import Wishes

SECONDS = 20.0
"""Nothing here waits so long unless it is broken."""


class Nodes:
    """The nodes of a run, all in this process; 0 is the host."""

    def __init__(self, count: int, silence: float = SECONDS) -> None:
        self.at = Address("127.0.0.1", free_port())
        self.silence = silence
        self.host = Host(self.at, "the run", count, silence)
        self.endings = [Ending() for _ in range(count)]
        self.guests: dict[int, Guest] = {}
        self.entries: list[Entry] = []
        self._pool = ThreadPoolExecutor(count + 1)

    def call(self, rank: int, run: str = "the run") -> Future[Entry]:
        guest = self.guests[rank] = Guest(self.at, run, rank, self.silence)
        ending = self.endings[rank]
        return self._pool.submit(guest.join, {"rank": rank}, SECONDS, ending, lambda entry: None)

    def gather(self) -> None:
        joining = [self.call(rank) for rank in range(1, len(self.endings))]
        self.host.gather({"rank": 0}, SECONDS, self.endings[0])
        self.entries = [self.host.open(1), *(one.result(SECONDS) for one in joining)]

    def until(self, condition: Callable[[], object]) -> None:
        """All of them attend, as nodes do whose trainers run."""
        deadline = time.monotonic() + SECONDS
        while True:
            self.host.attend(self.endings[0])
            for rank, guest in self.guests.items():
                guest.attend(self.endings[rank])
            if condition():
                return
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def close(self) -> None:
        for guest in self.guests.values():
            guest.close()
        self.host.leave(Verdict(DONE))
        self._pool.shutdown()


@pytest.fixture
def nodes() -> Iterator[Callable[..., Nodes]]:
    made: list[Nodes] = []

    def make(count: int = 2, **options: float) -> Nodes:
        made.append(Nodes(count, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


HOST = os.uname().nodename


def test_each_is_told_its_own_address_and_the_same_free_port_of_node_0(nodes: Callable[..., Nodes]) -> None:
    three = nodes(3)
    three.gather()
    assert {entry.own for entry in three.entries} == {"127.0.0.1"}
    assert {entry.interface for entry in three.entries} == {"lo"}
    [store] = {entry.store for entry in three.entries}
    assert (store.host, {entry.attempt for entry in three.entries}) == ("127.0.0.1", {1})
    assert store.port != three.at.port
    with socket.create_server(("", store.port)):
        pass


def test_what_is_no_node_keeps_nobody_out(nodes: Callable[..., Nodes]) -> None:
    two = nodes()
    strangers = [socket.create_connection((two.at.host, two.at.port)) for _ in range(4)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strangers[1].sendall(b"[1]\n")
    strangers[2].sendall(b'{"hello": 3}\n{"go": 1}\n{"hello": {"run": "the run", "rank": 1}}\n')
    strangers[3].close()
    two.gather()
    two.until(lambda: True)
    assert two.host.verdict is None


def test_a_node_that_hangs_up_ends_the_run_for_all_the_others(nodes: Callable[..., Nodes]) -> None:
    three = nodes(3)
    three.gather()
    three.guests.pop(1).close()
    three.until(lambda: three.guests[2].verdict)
    sentence = f"node 1 ({HOST}) is lost: its connection was closed"
    assert three.host.verdict == three.guests[2].verdict == Verdict(FAILED, sentence, 1)


@pytest.mark.full
def test_a_node_that_falls_silent_is_lost_after_the_stated_time(nodes: Callable[..., Nodes]) -> None:
    two = nodes(silence=1.0)
    mute = socket.create_connection((two.at.host, two.at.port))
    hello = {"run": "the run", "rank": 1, "host": "gpu-07", "facts": {}, "now": time.time()}
    mute.sendall(json.dumps({"hello": hello}).encode() + b"\n")
    began = time.monotonic()
    two.host.gather({}, SECONDS, two.endings[0])
    two.until(lambda: two.host.verdict)
    assert 1.0 < time.monotonic() - began < 3.0
    assert two.host.verdict == Verdict(
        FAILED, "node 1 (gpu-07) is lost: nothing was heard from it for 1 s", 1
    )
    mute.close()


@pytest.mark.full
def test_a_node_that_is_only_busy_is_heard(nodes: Callable[..., Nodes]) -> None:
    two = nodes(silence=1.0)
    two.gather()
    time.sleep(2.0)
    two.until(lambda: True)
    assert two.host.verdict is two.guests[1].verdict is None


def test_the_loss_of_node_0_ends_the_others_who_know_that_nobody_has_noted_it(
    nodes: Callable[..., Nodes],
) -> None:
    three = nodes(3)
    three.gather()
    three.host._exchange.close()
    three.until(lambda: three.guests[1].verdict and three.guests[2].verdict)
    for guest in three.guests.values():
        sentence = "node 0 (127.0.0.1) is lost: its connection was closed"
        assert (guest.verdict, guest.host_is_lost) == (Verdict(FAILED, sentence, 0), True)


def test_of_trainers_that_fail_by_one_another_the_first_is_blamed(nodes: Callable[..., Nodes]) -> None:
    """The killed one is; that it is heard of a moment later does not make it a consequence."""
    three = nodes(3)
    three.gather()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(three.host.ended, End(1), three.endings[0])
        time.sleep(0.3)
        second = pool.submit(three.guests[1].ended, End(-signal.SIGKILL), three.endings[1])
        third = pool.submit(three.guests[2].ended, End(1), three.endings[2])
        verdicts = [one.result(SECONDS) for one in (first, second, third)]
    sentence = f"the trainer of node 1 ({HOST}) was killed by SIGKILL"
    assert verdicts == [Verdict(FAILED, sentence, 1, -signal.SIGKILL)] * 3


def test_a_node_0_that_is_the_last_to_fail_knows_who_was_the_first(nodes: Callable[..., Nodes]) -> None:
    met = nodes()
    met.gather()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(met.guests[1].ended, End(1), met.endings[1])
        for _ in range(20):  # less than others are waited for
            met.host.attend(met.endings[0], 0.01)
        verdict = met.host.ended(End(1), met.endings[0])
        assert verdict is not None
        met.host.leave(verdict)
        assert other.result(SECONDS) == verdict
    assert verdict.sentence == f"the trainer of node 1 ({platform.node()}) failed with exit status 1"


def test_a_failed_trainer_ends_those_that_have_not_noticed(
    nodes: Callable[..., Nodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "COURT_SECONDS", 0.2)
    two = nodes()
    two.gather()
    began = time.monotonic()
    threading.Thread(target=two.guests[1].ended, args=(End(3), two.endings[1])).start()
    while two.host.verdict is None:
        two.host.attend(two.endings[0], 0.05)
    assert time.monotonic() - began < 5.0
    assert two.host.verdict.sentence == f"the trainer of node 1 ({HOST}) failed with exit status 3"


def test_what_one_nodes_worker_refuses_is_refused_on_all(nodes: Callable[..., Nodes]) -> None:
    two = nodes()
    two.gather()
    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(two.guests[1].ended, End(2, refusal="not so"), two.endings[1])
        first = pool.submit(two.host.ended, End(1), two.endings[0])
        assert first.result(SECONDS) == second.result(SECONDS) == Verdict(REFUSED, "not so", 1, 2)


def test_those_whose_trainers_are_done_wait_for_what_node_0_makes_of_it(nodes: Callable[..., Nodes]) -> None:
    two = nodes()
    two.gather()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(two.guests[1].ended, End(0), two.endings[1])
        assert two.host.ended(End(0), two.endings[0]) is None
        assert not other.done()
        leaving = threading.Thread(target=two.host.leave, args=(Verdict(FAILED, "it did nothing", 0),))
        leaving.start()
        assert other.result(SECONDS) == Verdict(FAILED, "it did nothing", 0)
        two.guests[1].close()
        leaving.join()


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_node_is_one_to_each(nodes: Callable[..., Nodes], told: int) -> None:
    three = nodes(3)
    three.gather()
    three.endings[told].hear(signal.SIGTERM)
    three.until(lambda: all(ending.signal == signal.SIGTERM for ending in three.endings))
    ended = End(-signal.SIGTERM, signal.SIGTERM)
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(three.guests[rank].ended, ended, three.endings[rank]) for rank in (1, 2)]
        assert three.host.ended(ended, three.endings[0]) is None, "nobody is to blame"
        pool.submit(three.host.leave, Verdict(128 + signal.SIGTERM))
        assert [one.result(SECONDS) for one in others] == [Verdict(128 + signal.SIGTERM)] * 2
        for guest in three.guests.values():
            guest.close()


def test_a_signal_while_they_wait_ends_the_waiting_of_all(nodes: Callable[..., Nodes]) -> None:
    three = nodes(3)
    waiting = three.call(1)
    hosting = ThreadPoolExecutor(1).submit(three.host.gather, {}, SECONDS, three.endings[0])
    time.sleep(0.2)
    three.endings[1].hear(signal.SIGINT)
    with pytest.raises(Stopped):
        waiting.result(SECONDS)
    with pytest.raises(Stopped):
        hosting.result(SECONDS)
    assert three.endings[0].signal == signal.SIGINT


def test_nodes_that_do_not_come_are_named(nodes: Callable[..., Nodes]) -> None:
    four = nodes(4)
    joining = four.call(2)
    with pytest.raises(Parted, match=rf"^nodes 1 and 3 did not call {four.at} within 0.4 s$"):
        four.host.gather({}, 0.4, four.endings[0])
    threading.Thread(target=four.host.leave, args=(Verdict(FAILED, "nodes 1 and 3 did not come"),)).start()
    with pytest.raises(Parted, match="nodes 1 and 3 did not come"):
        joining.result(SECONDS)
    four.guests[2].close()


def test_a_node_0_that_does_not_answer_is_named_with_the_reason() -> None:
    at = Address("127.0.0.1", free_port())
    with pytest.raises(Parted, match=rf"node 0 did not answer at {at} within 0.5 s: Connection refused"):
        Guest(at, "the run", 1, SECONDS).join({}, 0.5, Ending(), lambda entry: None)


def test_why_node_0_will_not_run_is_told_to_those_who_call(nodes: Callable[..., Nodes]) -> None:
    two = nodes()
    calling = two.call(1)
    threading.Thread(target=two.host.turn_away, args=("its disk is full", Ending())).start()
    with pytest.raises(PolycomError, match=r"^its disk is full$"):
        calling.result(SECONDS)
    two.guests[1].close()


def test_a_node_of_another_run_is_refused(nodes: Callable[..., Nodes]) -> None:
    two = nodes()
    with contextlib.closing(Guest(two.at, "another", 1, SECONDS)) as stranger:
        waiting = ThreadPoolExecutor(1).submit(stranger.join, {}, SECONDS, Ending(), lambda entry: None)
        with pytest.raises(Parted):
            two.host.gather({}, 0.5, two.endings[0])
        with pytest.raises(
            PolycomError, match=f"at {two.at} the nodes of the run meet, not those of another"
        ):
            waiting.result(SECONDS)


@pytest.mark.full
def test_a_second_node_of_one_rank_is_refused_once_it_is_clear_that_the_first_one_lives(
    nodes: Callable[..., Nodes],
) -> None:
    two = nodes(silence=1.0)
    two.gather()
    second = ThreadPoolExecutor(1).submit(
        Guest(two.at, "the run", 1, 1.0).join, {}, SECONDS, Ending(), lambda entry: None
    )
    two.until(second.done)
    with pytest.raises(PolycomError, match=rf"node 1 \({HOST}\) is there already"):
        second.result()
    assert two.host.verdict is None


def test_a_port_that_somebody_has_is_named(nodes: Callable[..., Nodes]) -> None:
    two = nodes()
    with pytest.raises(Parted, match=f"node 0 cannot listen at {two.at}: Address already in use"):
        Host(two.at, "the run", 2, SECONDS)


@pytest.mark.parametrize("text", ["gpu-01", "gpu-01:", ":29500", "gpu-01:0", "gpu-01:65536", "gpu-01:x"])
def test_what_is_no_host_and_port_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Address.parse(text)


def test_an_ipv6_address_is_written_in_brackets() -> None:
    assert str(Address.parse("[fd00::1]:29500")) == "[fd00::1]:29500"
    assert interface_of("fd00::1") is None


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_passed_on_and_the_same_from_the_job_system_are_one(
    tmp_path: Path, signum: signal.Signals
) -> None:
    """Slurm tells every node, and so do the nodes: a trainer that is saving is not killed for that."""
    ending, name = Ending(), signum.name.removeprefix("SIG")
    script = f"trap 'echo told >> told; sleep 0.6; exit 7' {name}; while :; do sleep 0.05; done"
    begun = time.monotonic()
    heard: list[int] = []

    def tick() -> None:
        if ending.signal is not None and not heard:
            heard.append(signum)
            ending.hear(signum)
        elif time.monotonic() - begun > 0.2:
            ending.pass_on(signum)

    with (tmp_path / "log").open("ab") as log:
        outcome = launch.launch(f"cd {tmp_path}; {script}", {}, log, tick, ending)
    assert (outcome.status, outcome.interrupted) == (7, signum)
    assert (tmp_path / "told").read_text() == "told\n"


def test_a_command_may_be_longer_than_an_argument(tmp_path: Path) -> None:
    script = f"echo start\n# {'x' * (1 << 18)}\necho $0 > /dev/null; echo end\n"
    with (tmp_path / "log").open("ab") as log:
        assert launch.launch(script, {}, log, lambda: None, Ending()).log == "start\nend\n"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"disc": "50G"}, r"unknown key 'disc' \(did you mean 'disk'\?\); known: off, disk, clock"),
        ({"off": ["idel"]}, r"preflight.off: no check 'idel' \(did you mean 'idle'\?\)"),
        ({"disk": "much"}, "preflight.disk must be a number of bytes, as in 50G, not 'much'"),
        ({"silence": 0}, "preflight.silence must be a number above 0, not 0"),
    ],
)
def test_a_wish_that_is_none_is_refused(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(PolycomError, match=f"^site.yaml: .*{sentence}"):
        Wishes.from_mapping(given, "site.yaml")


def test_wishes_are_read_as_people_write_them() -> None:
    wishes = Wishes.from_mapping({"disk": "1.5T", "off": "idle", "bandwidth": 20}, "site.yaml")
    assert wishes == Wishes(off=("idle",), disk=1_500_000_000_000, bandwidth=20.0)
    assert not wishes.wants("idle")
    assert wishes.wants("disk")


def test_how_names_signals_and_statuses() -> None:
    assert [lobby.how(status) for status in (-9, 3)] == ["was killed by SIGKILL", "failed with exit status 3"]
