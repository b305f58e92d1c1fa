"""torch.distributed.run, ending as the worker did that failed first: with its exit status, or by its signal.

python -m polycom_ext.runs.torchrun OPTIONS-OF-torch.distributed.run
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main() -> None:
    """Start the workers and wait for them."""
    try:
        torchrun()
    except ChildFailedError as error:
        traceback.print_exc()
        _, first = error.get_first_failure()
        sys.stderr.flush()
        _end_like(first.exitcode)


def _end_like(status: int) -> None:
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the worker has left its own
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status if status > 0 else 1)


if __name__ == "__main__":
    main()
