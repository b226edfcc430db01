"""WandB: curves of a training in a run of Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamrec.storage import Version
from streamrec.trainers.callbacks import Callback, Progress

__all__ = ["WandB"]


class WandB(Callback):
    """Logs into `run`, as `wandb.init(...)` gives it: project, mode and credentials are yours, and so is `finish()`.

    Each row has the number of `events`, which its charts are drawn over. Metrics since the start are under their names,
    those of a window under `window/`, what became of events under `counts/`. `every`: events between two rows.

    Needs `pip install "streamrec[wandb]"`, or a `wandb` of your own.
    """

    def __init__(self, run: Any, *, every: int = 10_000) -> None:
        self.every = every
        self._run = run
        run.define_metric("events")
        run.define_metric("*", step_metric="events")

    def on_log(self, progress: Progress, logs: Mapping[str, float]) -> None:
        """Log a row of metrics and counts."""
        self._run.log({**logs, "events": progress.events})

    def on_evaluate(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Log a row of a window's metrics, and when it was."""
        named = {name if "/" in name else f"window/{name}": value for name, value in metrics.items()}
        self._run.log({**named, "events": progress.events})

    def on_save(self, progress: Progress, version: Version) -> None:
        """Log the checkpoint's number."""
        self._run.log({"checkpoint": version.number, "events": progress.events})
