"""`polycom node RUN_DIR`: execute a planned run, or go on with it, on this node.

The same command on every node and under every backend; it reads the run's record, and secrets from its own
environment. The first node holds the directory, shows the metrics and notes attempts and their ends; the
exit status is the same on all. A backend may start it again on 128 + SIGNAL, and on 1 at its discretion.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from polycom_ext.errors import PolycomError
from polycom_ext.runs import absent, attempt, launch, lobby, plan, preflight, record
from polycom_ext.runs.entry import DISK_FULL, RUN_DIR
from polycom_ext.runs.keeping import Keeper
from polycom_ext.runs.lobby import DONE, FAILED, REFUSED, SIGNALLED, Parted, Stopped, Verdict
from polycom_ext.runs.lobby.guest import Guest
from polycom_ext.runs.lobby.host import Host
from polycom_ext.runs.lobby.network import Address
from polycom_ext.runs.plan import Run
from polycom_ext.runs.rendering import ADDRESS, NODE_RANK, RENDEZVOUS, Command, render
from polycom_ext.runs.wishes import Wishes

LOCKED_LOG = "POLYCOM_LOCKED_LOG"
"""Environment variable of a node whose parent has planned the run and waits for it: the log's descriptor."""
ORPHAN_SECONDS = 45.0
"""So long a node started again waits for the trainer of the one before, which ends as it has lost that."""
SOCKET_INTERFACE = "GLOO_SOCKET_IFNAME"
"""Otherwise gloo asks for the address of the machine's name."""


@dataclass(frozen=True)
class Place:
    """Which node of its run this is."""

    rank: int
    rendezvous: Address | None
    """Of the first node; None for a run on one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Execute a planned run on this node, or go on with it. Exit status: 0 done, 1 failed, 2 refused (one "
        "sentence says why), 128 + SIGNAL stopped by it."
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="directory that `polycom run` has written"
    )
    parser.add_argument(
        "--node-rank",
        metavar="N",
        default=os.environ.get(NODE_RANK, "0"),
        help=f"which of the spec's `nodes` this is, the first one 0 (default: ${NODE_RANK}, else 0)",
    )
    parser.add_argument(
        "--rendezvous",
        metavar="HOST:PORT",
        default=os.environ.get(RENDEZVOUS),
        help=f"where node 0 hears the others; several nodes need it (default: ${RENDEZVOUS})",
    )


def main(args: argparse.Namespace) -> int:
    """Run the trainer to its end and note how it ended."""
    inherited = os.environ.pop(LOCKED_LOG, None)
    if inherited is not None:
        args.verb = "run"  # which the user has typed
    run = plan.recorded(args.run_dir)
    place = _place(run, args.node_rank, args.rendezvous)
    ending = launch.Ending(run.spec.stop_grace_seconds)
    descriptor = None if inherited is None else int(inherited)
    with contextlib.ExitStack() as held:
        try:
            run.directory.check_place()
            if inherited is None and run.says_finished():
                return DONE
            patience = 0.0 if place.rendezvous is None else ORPHAN_SECONDS
            log = held.enter_context(run.directory.locked(place.rank, descriptor, patience))
            wishes = _wishes(run)
        except PolycomError as error:
            if place.rendezvous is not None:
                absent.note(run.directory, place.rank, str(place.rendezvous), str(error))
            raise
        run.directory.absent(place.rank).unlink(missing_ok=True)
        held.enter_context(launch.handled(ending.hear))
        node = _Node(run, place, wishes, inherited is not None, log, ending)
        return _first(node) if place.rank == 0 else _another(node)


@dataclass(frozen=True)
class _Node:
    """This node of its run."""

    run: Run
    place: Place
    wishes: Wishes
    is_checked: bool
    """Whether who has planned it has just seen that it can run here."""
    log: BinaryIO
    """Open and locked."""
    ending: launch.Ending
    began: float = field(default_factory=time.monotonic)

    def train(self, entry: lobby.Entry | None, tick: launch.Tick) -> launch.Outcome:
        """Run the trainer, by the command as it is on this node."""
        return self._launch(self.run.command, entry, tick)

    def measure(self, entry: lobby.Entry, tick: launch.Tick) -> launch.Outcome:
        """Take part in the measurement of the network between all nodes."""
        run, file = self.run, self.run.directory.bandwidth
        program = ["-m", "polycom_ext.runs.bandwidth", str(file), f"--floor={self.wishes.bandwidth}"]
        command = render(run.spec, run.adapter, run.directory.path, run.site.environment, program)
        return self._launch(command, entry, tick)

    def _launch(self, command: Command, entry: lobby.Entry | None, tick: launch.Tick) -> launch.Outcome:
        environment = {RUN_DIR: str(self.run.directory.path), **self._way(entry)}
        return launch.launch(command.script(), environment, self.log, tick, self.ending)

    def _way(self, entry: lobby.Entry | None) -> dict[str, str]:
        """To the other nodes."""
        if entry is None:
            return {}
        way = {NODE_RANK: str(self.place.rank), RENDEZVOUS: str(entry.store), ADDRESS: entry.own}
        if entry.interface is not None and SOCKET_INTERFACE not in os.environ:
            way[SOCKET_INTERFACE] = entry.interface
        return way

    def end(self, outcome: launch.Outcome) -> lobby.End:
        """For the other nodes."""
        refusal = None if outcome.status == 0 else attempt.why_refused(self.run, outcome)
        return lobby.End(outcome.status, outcome.interrupted, refusal)

    def prepare(self) -> None:
        """Raise PolycomError for what this node lacks; several nodes hear of it from one another."""
        self.run.directory.enter_working_directory()
        if self.place.rendezvous is None and not self.is_checked:
            preflight.check(self.run)

    def look_for(self, rank: int) -> None:
        """Raise PolycomError or Parted where this node does not come."""
        absent.check(self.run.directory, rank, str(self.place.rendezvous))

    def facts(self) -> dict[str, Any]:
        """What the other nodes are told of this one."""
        try:
            self.prepare()
        except PolycomError as error:
            return {"problem": str(error)}
        return preflight.look(self.run, self.wishes)


def _place(run: Run, rank: str, rendezvous: str | None) -> Place:
    nodes = run.spec.nodes
    if nodes == 1:
        return Place(0, None)
    if not (rank.isascii() and rank.isdigit() and int(rank) < nodes):
        raise PolycomError(
            f"{run.name}: node rank {rank!r} is none of 0 to {nodes - 1}, as it has {nodes} nodes"
        )
    if not rendezvous:
        raise PolycomError(
            f"{run.name}: its {nodes} nodes need --rendezvous HOST:PORT, a free port of node 0"
        )
    try:
        return Place(int(rank), Address.parse(rendezvous))
    except ValueError:
        raise PolycomError(f"{run.name}: --rendezvous {rendezvous!r} is no HOST:PORT of node 0") from None


def _first(node: _Node) -> int:
    run, place = node.run, node.place
    company: lobby.Alone | Host = lobby.Alone()
    if place.rendezvous is not None:
        try:
            company = Host(place.rendezvous, _title(run), run.spec.nodes, node.wishes.silence)
        except Parted as error:
            print(f"{run.name}: {error}", file=sys.stderr)
            return FAILED
    verdict = Verdict(FAILED, f"node 0 ({platform.node()}) came to grief")
    try:
        node.prepare()
        verdict = _lead(node, company)
        if verdict.status == REFUSED:
            raise PolycomError(f"{run.name}: {verdict.sentence}")
    except PolycomError as error:
        company.turn_away(str(error).removeprefix(f"{run.name}: "), node.ending)
        raise
    finally:
        company.leave(verdict)
    return verdict.status


def _lead(node: _Node, company: lobby.Alone | Host) -> Verdict:
    """An attempt, noted from its beginning to its end; what became of it."""
    run, ending = node.run, node.ending
    step = run.latest_step()
    run.directory.clear_metrics(run.spec, run.adapter)
    for sentence in run.adapter.prepare_resume(run.spec, run.directory.path):
        print(f"{run.name}: passed over: {sentence}", file=sys.stderr)
    run.directory.begin_attempt(node.log, step)
    try:
        entry = _gathered(node, company) if isinstance(company, Host) else None
    except (Parted, Stopped, PolycomError) as error:
        return _not_begun(node, error)
    how = "starting" if step is None else f"resuming from step {step}"
    print(f"{run.name}: {how}; everything it says goes to {run.directory.log}", flush=True)
    follower = attempt.Follower(run)

    keeper = Keeper(run)

    def tick() -> None:
        company.attend(ending)
        follower()
        keeper()

    outcome = node.train(entry, tick)
    verdict = company.ended(node.end(outcome), ending)
    attempt.note_end(run, outcome, verdict)
    keeper.finish()
    complete = run.is_complete()
    verdict = _judge(node, outcome, verdict, complete)
    if verdict.status != DONE:
        return verdict
    if not complete and attempt.did_nothing(run, follower, step):
        what = "the trainer ended without a step and without an error"
        attempt.show_end_of_log(run, 0, outcome, what)
        return Verdict(FAILED, what, 0)
    if complete and run.spec.entry.learnable:
        attempt.write_coefficients(run)
    how = "finished in" if complete else "ended before its last step, after"
    print(f"{run.name}: {how} {attempt.since(node.began)} ({run.directory.path})", flush=True)
    return verdict


def _gathered(node: _Node, host: Host) -> lobby.Entry:
    run = node.run
    others = run.spec.nodes - 1
    print(f"{run.name}: waits for {others} more node{'s' * (others > 1)}", flush=True)
    facts = preflight.look(run, node.wishes)
    present = host.gather(facts, node.wishes.wait, node.ending, node.look_for)
    if wrong := preflight.compare(present, run.spec.processes_per_node, node.wishes):
        raise PolycomError("; ".join(wrong))
    if node.wishes.bandwidth is not None:
        _measure(node, host, present)
    return host.open(len(run.directory.attempts()))


def _measure(node: _Node, host: Host, present: lobby.Present) -> None:
    """Raise PolycomError for a network that is slower than the site asks for, Parted for one that fails."""
    run, floor = node.run, node.wishes.bandwidth or 0.0
    print(f"{run.name}: measures the network between the nodes", flush=True)
    outcome = node.measure(host.measure(), lambda: host.attend(node.ending))
    lobby.check(node.ending)
    if host.verdict is not None:
        raise Parted(host.verdict.sentence)
    if outcome.status != 0:
        how = lobby.how(outcome.status)
        raise Parted(f"the measurement of the network {how}, see {run.directory.log}")
    if slow := preflight.slow(run.directory.read_bandwidth(), present, floor):
        raise PolycomError(slow)


def _not_begun(node: _Node, error: Exception) -> Verdict:
    """What becomes of an attempt whose nodes did not come together."""
    run, signum = node.run, node.ending.signal
    if isinstance(error, PolycomError):
        record.refuse(run.directory.path, str(error))
        run.directory.end_attempt(REFUSED)
        return Verdict(REFUSED, str(error), 0)
    if signum is not None:
        run.directory.end_attempt(-signum, signal=signum)
        return Verdict(_stopped(node, signum))
    run.directory.end_attempt(FAILED, cause=str(error))
    print(f"{run.name}: {error}", file=sys.stderr)
    return Verdict(FAILED, str(error))


def _another(node: _Node) -> int:
    """A node of which nothing is noted but what its workers refuse, and that node 0 is lost."""
    run, ending = node.run, node.ending
    assert node.place.rendezvous is not None
    said = f"everything it says goes to {run.directory.log_of(node.place.rank)}"
    print(f"{run.name}: node {node.place.rank} calls {node.place.rendezvous}; {said}", flush=True)

    def measure(entry: lobby.Entry) -> None:
        node.measure(entry, lambda: None)  # what node 0 says meanwhile is read afterwards

    guest = Guest(node.place.rendezvous, _title(run), node.place.rank, node.wishes.silence)
    try:
        entry = guest.join(node.facts(), node.wishes.wait, ending, measure, node.look_for)
        outcome = node.train(entry, lambda: guest.attend(ending))
        verdict = guest.ended(node.end(outcome), ending)
    except Stopped:
        return _stopped(node, ending.signal or 0)
    except Parted as error:
        print(f"{run.name}: {error}", file=sys.stderr)
        return FAILED
    except PolycomError as error:
        raise PolycomError(f"{run.name}: {error}") from None
    finally:
        guest.close()
    if verdict is not None and verdict.rank == 0 and guest.host_is_lost:
        attempt.note_lost_host(run, entry.attempt, verdict)
    complete = outcome.status == 0 if verdict is None else verdict.status == DONE
    verdict = _judge(node, outcome, verdict, complete)
    if verdict.status == REFUSED:
        raise PolycomError(f"{run.name}: {verdict.sentence}")
    return verdict.status


def _wishes(run: Run) -> Wishes:
    return Wishes.from_mapping(run.site.preflight, str(run.directory.site))


def _title(run: Run) -> str:
    """By which a node knows that it has called the right one."""
    return f"{run.name} in {run.directory.read_versions().get('directory', run.directory.path)}"


def _judge(node: _Node, outcome: launch.Outcome, verdict: Verdict | None, complete: bool) -> Verdict:
    """How this node ends, explained; `verdict` is of all nodes, where one of them has ended it."""
    run = node.run
    if outcome.interrupted is not None and not complete and outcome.status != DISK_FULL:
        return Verdict(_stopped(node, outcome.interrupted))
    if verdict is None:
        if outcome.status == 0:
            return Verdict(DONE)
        refusal = attempt.why_refused(run, outcome)
        verdict = Verdict(FAILED if refusal is None else REFUSED, refusal or "", node.place.rank)
    if verdict.status == FAILED and verdict.rank == node.place.rank and outcome.status != 0:
        attempt.explain_failure(run, node.place.rank, outcome)
    elif verdict.status == FAILED:
        print(f"{run.name}: {verdict.sentence}; so the trainer of this node was ended", file=sys.stderr)
    return verdict


def _stopped(node: _Node, signum: int) -> int:
    step = node.run.latest_step()
    goes_on = "starts anew" if step is None else f"goes on from the last checkpoint, of step {step}"
    print(
        f"{node.run.name}: stopped after {attempt.since(node.began)}; the same command {goes_on}",
        file=sys.stderr,
    )
    return SIGNALLED + signum
