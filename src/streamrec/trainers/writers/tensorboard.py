"""TensorBoard: curves of a training as event files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from streamrec.errors import ConfigError
from streamrec.storage import Version
from streamrec.trainers.callbacks import Callback, Progress

__all__ = ["TensorBoard"]


class TensorBoard(Callback):
    """Writes what is logged into the folder `log_dir`, by `torch.utils.tensorboard`; the steps are events.

    Metrics since the start are under their names, those of a window under `window/`, what became of events under
    `counts/`, checkpoints under `checkpoint`. `every`: events between two points of a curve.

    Needs `pip install "streamrec[tensorboard]"`. Raises `ConfigError` without it.
    """

    def __init__(self, log_dir: str | os.PathLike[str], *, every: int = 10_000) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError('TensorBoard needs tensorboard: pip install "streamrec[tensorboard]"') from error
        self.every = every
        self._writer: Any = SummaryWriter(os.fspath(log_dir))

    def _write(self, progress: Progress, values: Mapping[str, float], prefix: str = "") -> None:
        for name, value in values.items():
            self._writer.add_scalar(prefix + name, value, progress.events)

    def on_log(self, progress: Progress, logs: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        self._write(progress, logs)

    def on_evaluate(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Add a point to the curves of the windows, at the events there were when it had closed."""
        self._write(progress, {name: metrics[name] for name in metrics if "/" not in name}, "window/")

    def on_save(self, progress: Progress, version: Version) -> None:
        """Add the checkpoint's number."""
        self._write(progress, {"checkpoint": float(version.number)})
        self._writer.flush()

    def on_train_end(self, progress: Progress) -> None:
        """Have all that was told on disk."""
        self._writer.flush()
