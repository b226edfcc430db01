"""Callbacks: what is told of a training while it goes on, by the names that Hugging Face's `Trainer` has for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from streamrec.errors import ConfigError
from streamrec.evaluators import Report, Window
from streamrec.storage import Version

__all__ = ["Callback", "Calls", "Progress"]

log = logging.getLogger(__name__)


class Progress(NamedTuple):
    """How far a training is: `events` taken so far, those of earlier runs among them, and `epoch`, from 0."""

    events: int
    epoch: int = 0


class Callback:
    """Is told of a training: override what you want to hear. `OnlineTrainer` and `BatchTrainer` take any number.

    The names are those of `transformers.TrainerCallback`; an endless stream has no epochs, and nothing here steers the
    training. All are called between two micro-batches, on the thread that trains, so what is slow belongs elsewhere.
    What they raise does not stop the stream: it is logged, and the report counts it as `callback_errors`. They are no
    part of a checkpoint: a run that is resumed tells again what was not saved.

    >>> class Shout(Callback):
    ...     every = 500
    ...
    ...     def on_log(self, progress, logs):
    ...         print(progress.events, f"AUC {logs['AUC']:.1f}")
    >>> from streamrec import AUC, FM, Id, Impression, Labeled, Memory, OnlineTrainer, Schema
    >>> shown = [Impression(f"i{n}", float(n), "u1", f"p{n % 2}") for n in range(1000)]
    >>> trainer = OnlineTrainer(model=FM(Schema(Id("item")), dim=4), metrics=[AUC()], callbacks=[Shout()])
    >>> report = trainer.run(Memory([Labeled(one, float(one.item == "p1")) for one in shown]))
    512 AUC 1.0
    1000 AUC 1.0
    """

    every: int = 10_000
    """Events between two calls of `on_log`, at least: it comes after the micro-batch that completes them."""

    def on_train_begin(self, progress: Progress) -> None:
        """A training begins, by `run` or `OnlineTrainer.training`; what it goes on from has been read."""

    def on_step_end(self, progress: Progress) -> None:
        """A micro-batch of a stream, or a window of an archive, was learned."""

    def on_log(self, progress: Progress, logs: Mapping[str, float]) -> None:
        """The metrics since the start, and what became of the events, as `counts/...`; undefined ones are left out."""

    def on_evaluate(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Of a stream, a window of event time has closed: its metrics, with `window/start` and `window/end`; told
        before the next `on_log`. Of an archive, an epoch was judged on the validation part."""

    def on_save(self, progress: Progress, version: Version) -> None:
        """A checkpoint is on disk."""

    def on_train_end(self, progress: Progress) -> None:
        """It has ended, whatever has ended it."""


class Calls:
    """Tells callbacks, and outlives what they raise."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        for one in callbacks:
            if not isinstance(one, Callback):
                raise ConfigError(f"a callback is an object of a subclass of Callback, got {one!r}")
            if not one.every >= 1:
                raise ConfigError(f"every of {type(one).__name__} must be >= 1 event, got {one.every!r}")
        self._callbacks = [*callbacks]
        self._next = [one.every for one in callbacks]  # at how many events each logs next
        self._last = [-1 for _ in callbacks]  # at how many it has
        self._window = -float("inf")  # the end of the last window told of
        self._failed: set[tuple[int, str]] = set()
        self.errors = 0
        """What callbacks have raised, in this process."""

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def tell(self, name: str, *told: Any) -> None:
        """Call `name` of all of them."""
        for place in range(len(self._callbacks)):
            self._tell(place, name, *told)

    def _tell(self, place: int, name: str, *told: Any) -> None:
        one = self._callbacks[place]
        try:
            getattr(one, name)(*(dict(each) if isinstance(each, dict) else each for each in told))  # theirs to change
        except Exception:
            self.errors += 1
            if (place, name) not in self._failed:  # once with its traceback, not at each step
                self._failed.add((place, name))
                log.exception("%s.%s failed; the training goes on", type(one).__name__, name)

    def go_on(self, progress: Progress) -> None:
        """A run begins at so many events: what was logged before them was logged."""
        self._next = [progress.events - progress.events % one.every + one.every for one in self._callbacks]
        self.tell("on_train_begin", progress)

    def due(self, events: int) -> bool:
        """Whether any of them logs after so many events."""
        return any(events >= when for when in self._next)

    def log(self, progress: Progress, report: Report, *, all_of_them: bool = False) -> None:
        """Tell those that are due, or all that do not know it yet, what the report says; and all of them of the windows
        that have closed."""
        for window in report.windows[:-1]:  # the last one is open
            if window.end > self._window:
                self._window = window.end
                self.tell("on_evaluate", progress, _of(window))
        logs = {**_finite(report.metrics), **{f"counts/{name}": float(n) for name, n in report.counts.items()}}
        for place, one in enumerate(self._callbacks):
            if progress.events >= self._next[place] or (all_of_them and progress.events > self._last[place]):
                self._last[place] = progress.events
                self._next[place] = progress.events - progress.events % one.every + one.every
                self._tell(place, "on_log", progress, logs)


def _of(window: Window) -> dict[str, float]:
    return {**_finite(window.metrics), "window/start": window.start, "window/end": window.end}


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if abs(value) < float("inf")}
