"""BatchTrainer: epochs over an archive of labeled rows, before the stream."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from streamrec.batch import LabeledRows
from streamrec.errors import ConfigError, StoreError
from streamrec.evaluators import LogLoss, NormalizedEntropy, Report
from streamrec.protocols import Metric, Model, RowSource, State
from streamrec.storage import Store, Version
from streamrec.trainers._bar import Bar
from streamrec.trainers._saved import description, plain, require_same
from streamrec.trainers._stop import stop_on_signals
from streamrec.trainers.callbacks import Callback, Calls, Progress

__all__ = ["BatchTrainer"]

FORMAT = 1
"""Of the checkpoints written here. Another one is refused."""


class BatchTrainer:
    """Learns labeled rows, again and again, in time order or shuffled; what it has learned goes on in a stream.

    `model`: learns row by row, as in a stream: the optimizers' memory and the ids stay with it. `epochs`: at most.
    `window`: rows (of an `EncodedRows`) or events (of a `JoinedEvents`) read, and held in memory, at a time.
    `shuffle`: learn those of a window in an order drawn by `seed`; else in the order they come. `validation`: the last
    share of event time, which is not learned but judged after each epoch by `metrics` and by log loss; the epoch of the
    lowest log loss is the one that stays, and after `patience` epochs without a lower one the training stops.
    `schedule`: gives what the optimizers' steps are multiplied by, from the share of the training that is done, window
    by window: `streamrec.trainers.Linear`, `Cosine` or a function of your own. `store`: a `Store` or where to make
    one; a checkpoint is written every `checkpoint_seconds` on `clock`, between two windows, and at the end, when the
    model is published too. `callbacks`: are told how it goes.

    A module of torch learns as `streamrec.trainers.Dense(module)`, with gradient accumulation and bf16 autocast.

    >>> from streamrec import FM, Id, Impression, Labeled, Memory, OnlineTrainer, Schema
    >>> from streamrec.trainers import JoinedEvents
    >>> shown = [Impression(id=f"i{n}", time=float(n), user="u1", item=f"p{n % 2}") for n in range(100)]
    >>> archive = Memory([Labeled(one, label=float(one.item == "p1")) for one in shown])
    >>> schema = Schema(Id("user"), Id("item"))
    >>> batch = BatchTrainer(model=FM(schema, dim=4), epochs=5, validation=0.2)
    >>> report = batch.run(JoinedEvents(archive, schema=schema))
    >>> report.metrics["LogLoss"] < 0.3, report.counts["epochs"], report.counts["learned"]
    (True, 5, 400)
    >>> stream = OnlineTrainer(model=batch.model)  # goes on
    """

    def __init__(
        self,
        *,
        model: Model,
        epochs: int = 1,
        window: int = 65_536,
        shuffle: bool = False,
        seed: int = 0,
        validation: float = 0.0,
        patience: int = 1,
        metrics: Sequence[Metric] = (),
        schedule: Callable[[float], float] | None = None,
        store: Store | str | os.PathLike[str] | None = None,
        checkpoint_seconds: float = 60.0,
        callbacks: Sequence[Callback] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("epochs", epochs), ("window", window), ("patience", patience)):
            if value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value!r}")
        if seed < 0:
            raise ConfigError(f"seed must be >= 0, got {seed!r}")
        if not 0 <= validation < 1:
            raise ConfigError(f"validation must be a share of event time from 0 to 1 (excluded), got {validation!r}")
        if not checkpoint_seconds > 0:
            raise ConfigError(f"checkpoint_seconds must be > 0, got {checkpoint_seconds!r}")
        if schedule is not None and not hasattr(model, "rate"):
            raise ConfigError(f"a {type(model).__name__} has no `rate` that a schedule could set; leave schedule out")
        self.model = model
        self.epochs = epochs
        self.window = window
        self.shuffle = shuffle
        self.seed = seed
        self.validation = validation
        self.patience = patience
        self.metrics = list(metrics) or [NormalizedEntropy()]
        self.schedule = schedule
        self.store = Store(store) if isinstance(store, (str, os.PathLike)) else store
        self.checkpoint_seconds = checkpoint_seconds
        self.history: list[dict[str, float]] = []
        """What validation said after each epoch, by name of the metric."""
        self._calls = Calls(callbacks)
        self._clock = clock
        self._clear()

    def _clear(self) -> None:
        self._epoch = self._window = self._learned = 0
        self._done = False
        self._before: float | None = None  # the event time before which rows are learned, once it is known
        self._best: tuple[int, State] | None = None  # the epoch, from 0, and the model after it
        self._seconds = 0.0
        self.history = []

    # -- learning ------------------------------------------------------------------------------------------------------

    def run(self, rows: RowSource, *, progress: bool = True) -> Report:
        """Learn these rows, from where they stand, going on from the newest checkpoint of the store.

        `progress`: show a bar, where standard error is a terminal.
        SIGTERM and SIGINT end it between two windows, with a checkpoint. The metrics of the report are those of the
        best epoch on the validation part. Raises `SchemaError` or `ConfigError` where rows, model and checkpoint do not
        fit together, and `StoreError` where a checkpoint cannot be written. A run that has ended is not begun again:
        running it once more only reports.
        """
        self.model.schema.require(rows.schema, what="the rows")
        if self.schedule is not None and rows.fraction() is None:
            raise ConfigError("a schedule needs to know how long the training is, but the rows do not; leave it out")
        start = rows.state_dict()
        self.resume(rows)
        if self._done:
            return self._report(rows, interrupted=False)
        self._calls.go_on(self._progress_now)
        try:
            return self._run(rows, start, progress)
        finally:
            self._calls.tell("on_train_end", self._progress_now)

    @property
    def _progress_now(self) -> Progress:
        return Progress(self._learned, self._epoch)

    def _run(self, rows: RowSource, start: State, progress: bool) -> Report:
        begun = saved = self._clock()
        if self._before is None:
            self._before = self._split(rows)
        split, done = self._before, False
        bar_of: dict[str, Any] = {"total": 1.0, "disable": None if progress else True, "bar_format": PROGRESS}
        with stop_on_signals() as stop, self._rate_of_one(), Bar(**bar_of) as bar:
            while True:
                while not stop.is_set() and (part := self._read(rows)) is not None:
                    self._learn(_between(part, -np.inf, split))
                    bar.update(max(0.0, self._progress(rows) - bar.n))
                    if self._calls:
                        self._calls.tell("on_step_end", self._progress_now)
                        if self._calls.due(self._learned):
                            self._calls.log(self._progress_now, self._report(rows, interrupted=False))
                    if self._is_due(saved):
                        self._seconds, begun = self._seconds + self._clock() - begun, self._clock()
                        self.checkpoint(rows)
                        saved = self._clock()
                if stop.is_set():
                    break
                done = self._end_epoch(rows, start, split)
                bar.set_postfix(self.history[-1] if self.history else {})
                if done:
                    break
        self._seconds += self._clock() - begun
        if self._best is not None and done and self._best[0] != self._epoch - 1:
            self.model.load_state_dict(self._best[1])
        self._keep(rows, done)
        report = self._report(rows, interrupted=not done)
        self._calls.log(self._progress_now, report, all_of_them=True)
        return report

    def _keep(self, rows: RowSource, done: bool) -> None:
        """Save what the training has come to."""
        if self.store is not None:
            self.checkpoint(rows)
            if done:
                self.publish()

    def _is_due(self, saved: float) -> bool:
        """Whether a checkpoint is to be written now, the last having been at `saved`."""
        return self.store is not None and self._clock() - saved >= self.checkpoint_seconds

    def _read(self, rows: RowSource) -> LabeledRows | None:
        """The next window, in the order in which it is learned; sets the rate at which it is."""
        if self.schedule is not None:
            self.model.rate = self.schedule(self._progress(rows))  # type: ignore[attr-defined]
        part = rows.read(self.window)
        if part is not None and self.shuffle:
            # by its number, so that a run that is resumed draws the same
            draw = np.random.default_rng([self.seed, self._epoch, self._window])
            part = part.take(draw.permutation(len(part.labels)))
        self._window += 1
        return part

    def _learn(self, rows: LabeledRows) -> None:
        if len(rows.labels):
            self.model.learn(*rows)
            self._learned += len(rows.labels)

    def _progress(self, rows: RowSource) -> float:
        return min(1.0, (self._epoch + (rows.fraction() or 0.0)) / self.epochs)

    def _end_epoch(self, rows: RowSource, start: State, split: float) -> bool:
        """Judge what was learned; begin the next epoch, unless this was the last: then true."""
        if flush := getattr(self.model, "flush", None):  # a `Dense` waits for rows that fill a step
            flush()
        if split < np.inf:
            rows.load_state_dict(start)
            self._judge(rows, split)
        self._epoch += 1
        self._window = 0
        since_best = 0 if self._best is None else self._epoch - 1 - self._best[0]
        self._done = self._epoch == self.epochs or since_best >= self.patience
        if not self._done:
            rows.load_state_dict(start)
        return self._done

    def _judge(self, rows: RowSource, split: float) -> None:
        loss = LogLoss()
        metrics: Sequence[Metric] = [loss, *(metric.fresh() for metric in self.metrics)]
        while (part := rows.read(self.window)) is not None:
            judged = _between(part, split, np.inf)
            scores = self.model.predict(judged.batch)
            for metric in metrics:
                for kind in metric.kinds[:1]:  # the rows are of one kind, whatever its name
                    metric.update(judged.labels, scores, judged.weights, kind)
        metrics = self._whole(metrics)
        found = {metric.name: metric.compute() for metric in metrics}
        if np.isnan(found[loss.name]):
            raise ConfigError(
                f"no row has an event time in the last share validation={self.validation!r}, or none can be judged: "
                "give it more"
            )
        self.history.append(found)
        self._calls.tell("on_evaluate", self._progress_now, found)
        if self._best is None or found[loss.name] < self.history[self._best[0]][loss.name]:
            self._best = self._epoch, self.model.state_dict()

    def _whole(self, metrics: Sequence[Metric]) -> Sequence[Metric]:
        """What the metrics say of all that is judged, given what they say of what was judged here."""
        return metrics

    def _split(self, rows: RowSource) -> float:
        """The event time from which rows are for validation; inf where none are."""
        if not self.validation:
            return float(np.inf)
        span = rows.span()
        if span is None or not span[0] < span[1]:
            raise ConfigError("there is no time to split: the rows have no event times, or all the same")
        return span[1] - self.validation * (span[1] - span[0])

    @contextmanager
    def _rate_of_one(self) -> Iterator[None]:
        """The model's rate is 1 again after the training, for the stream that follows."""
        try:
            yield
        finally:
            if self.schedule is not None:
                self.model.rate = 1.0  # type: ignore[attr-defined]

    def _report(self, rows: RowSource, *, interrupted: bool) -> Report:
        counts = {"events": self._learned, "learned": self._learned - getattr(self.model, "left_out", 0)}
        counts |= {"pending": 0, "epochs": self._epoch, "left_out": getattr(self.model, "left_out", 0)}
        if self._calls.errors:
            counts["callback_errors"] = self._calls.errors
        if self._best is not None:
            counts["best_epoch"] = self._best[0] + 1
        known: Mapping[str, int] = getattr(rows, "counts", {})
        counts |= {name: count for name, count in known.items() if name not in ("events", "rows")}
        return Report(self._metrics(), counts, seconds=self._seconds, interrupted=interrupted)

    def _metrics(self) -> dict[str, float]:
        return dict(self.history[self._best[0]]) if self._best is not None else {}

    # -- saving --------------------------------------------------------------------------------------------------------

    def checkpoint(self, rows: RowSource) -> Version:
        """Save all that a resumed run needs, where the rows stand among it. Raises `StoreError`."""
        info = {"trainer": BatchTrainer.__name__, "model": description(self.model), "metrics": plain(self._metrics())}
        version = self._require_store().checkpoints.write(self._state(rows), info)
        self._calls.tell("on_save", self._progress_now, version)
        return version

    def _state(self, rows: RowSource) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "format": FORMAT,
            "model": self.model.state_dict(),
            "rows": rows.state_dict(),
            "epoch": self._epoch,
            "window": self._window,
            "learned": self._learned,
            "done": self._done,
            "before": self._before,
            "best": None if self._best is None else {"epoch": self._best[0], "model": self._best[1]},
            "history": self.history,
            "settings": self._settings(),
            "seconds": self._seconds,
        }

    def publish(self) -> Version:
        """Save the model as a version for scorers. Raises `StoreError`."""
        info = {"model": description(self.model), "metrics": plain(self._metrics()), "events": self._learned}
        state = getattr(self.model, "published", self.model.state_dict)()
        return self._require_store().versions.write({"model": state}, info)

    def resume(self, rows: RowSource) -> bool:
        """Become what the newest good checkpoint was cut from, and take the rows to where they stood; false where there
        is none. Raises `ConfigError` where the settings that the result depends on differ."""
        found = self._saved()
        if found is None:
            return False
        version, state = found
        what = f"checkpoint {version.number}"
        if version.info.get("trainer") != BatchTrainer.__name__:
            raise ConfigError(f"{what} was not cut by a BatchTrainer; use another store for a training of its own")
        if state["format"] != FORMAT:
            raise StoreError(f"{what} has format {state['format']!r}, this streamrec reads format {FORMAT}")
        require_same(self.model, version.info["model"], what=what)
        saved, mine = state["settings"], self._settings()
        differ = [
            f"{name}={saved.get(name)!r} there and {mine.get(name)!r} here"
            for name in saved | mine
            if saved.get(name) != mine.get(name) and not (state["done"] and (name not in saved or name not in mine))
        ]
        if differ:
            raise ConfigError(f"the settings differ from those of {what}: {'; '.join(differ)}; use those it had")
        self._become(state, rows)
        return True

    def _saved(self) -> tuple[Version, State] | None:
        return self.store.checkpoints.read() if self.store is not None else None

    def _become(self, state: State, rows: RowSource) -> None:
        """Go on from what `_state` has given."""
        self.model.load_state_dict(state["model"])
        rows.load_state_dict(state["rows"])
        self._epoch, self._window, self._learned = state["epoch"], state["window"], state["learned"]
        self._before = state["before"]
        self._done, self.history, self._seconds = state["done"], list(state["history"]), state["seconds"]
        best = state["best"]
        self._best = None if best is None else (best["epoch"], best["model"])

    def _settings(self) -> dict[str, Any]:
        """What a training that is resumed must have as it was."""
        names = ("epochs", "window", "shuffle", "seed", "validation", "patience")
        return {name: getattr(self, name) for name in names}

    def _require_store(self) -> Store:
        if self.store is None:
            raise ConfigError('this trainer keeps nothing: give it a store, such as store="runs/ctr"')
        return self.store


PROGRESS = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


def _between(rows: LabeledRows, since: float, before: float) -> LabeledRows:
    """Those with event times from `since` to `before` (excluded)."""
    times = rows.batch.times
    if since == -np.inf and before == np.inf:
        return rows
    return rows.take(np.flatnonzero((times >= since) & (times < before)))
