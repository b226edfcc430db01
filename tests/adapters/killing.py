"""How tests end a worker: as the system does when memory runs out."""

from __future__ import annotations

import multiprocessing
import os
import signal


def kill_worker(flag: str | None = None) -> None:
    """End this worker's process by SIGKILL, of which it hears nothing. `flag`: a file; only who makes it is killed.

    Does nothing in the process of the tests, where the scheduler, a thread there, unpacks tasks too.
    """
    if multiprocessing.parent_process() is None:
        return
    if flag is not None:
        try:
            with open(flag, "x"):
                pass
        except FileExistsError:
            return
    os.kill(os.getpid(), signal.SIGKILL)
