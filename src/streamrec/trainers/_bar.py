"""The bar that shows how far a run has come: tqdm's, without its thread and what it shares with other processes."""

from __future__ import annotations

import threading

from tqdm import tqdm

__all__ = ["Bar"]


class Bar(tqdm):  # type: ignore[misc]
    """Drawn where standard error is a terminal, with `disable=None`.

    tqdm's own lock is shared with all processes that a `fork` makes, drawn or not: where one of them is killed while it
    holds it, none of the others ever begins another run.
    """

    _lock = threading.RLock()
    monitor_interval = 0
