"""torch.distributed.run, ending as the worker did that failed first: with its exit status, or by its signal.

python -m polycom_ext.runs.torchrun OPTIONS-OF-torch.distributed.run
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import traceback

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.run import main as torchrun

from polycom_ext.runs.rendering import NODE_RANK

PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""


def main() -> None:
    """Start the workers and wait for them."""
    if NODE_RANK in os.environ:
        end_with_parent()
        _tell_nodes_apart(int(os.environ[NODE_RANK]))
    try:
        torchrun()
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        with contextlib.suppress(OSError):  # a log on a full disk
            traceback.print_exc()
            sys.stderr.flush()
        _end_like(first.exitcode)


def end_with_parent() -> None:
    """One of several nodes whose `polycom node` is gone cannot train on: the others have ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _tell_nodes_apart(rank: int) -> None:
    """torch's rendezvous knows a node by its address, its process id and a count.

    Two of one machine whose process ids are their own, such as pods in its network, may have all alike, and
    would be taken for one: count from the node's rank.
    """
    DynamicRendezvousHandler._node_desc_generator._local_id = rank << 32


def _end_like(status: int) -> None:
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the worker has left its own
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status if status > 0 else 1)


if __name__ == "__main__":
    main()
