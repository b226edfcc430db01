"""OnlineTrainer: score, wait for the label, judge the score that was served, learn."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.batch import Batch
from streamrec.errors import ConfigError, StoreError
from streamrec.evaluators import ProgressiveValidation, Report
from streamrec.evaluators.calibration import Calibrated, Calibrator, calibrator_from
from streamrec.events import (
    DeadLetter,
    Decoded,
    Feedback,
    Impression,
    Item,
    Labeled,
    Position,
    lines_of,
    piece_of,
)
from streamrec.hashing import uniform
from streamrec.preprocessors import DeadLetters, Encoder, LabelJoin, Validate
from streamrec.preprocessors.label_join import PASSED, UNKNOWN, event_codes
from streamrec.protocols import LEARN, SCORE, Metric, Model, OrderedModel, Source, Stage, State
from streamrec.schema import Text
from streamrec.storage import Archive, Store, Version
from streamrec.trainers._aside import letters_of, places_of
from streamrec.trainers._bar import Bar
from streamrec.trainers._checkpoints import Checkpoints
from streamrec.trainers._forget import forget_rows, names_of, purge_letters
from streamrec.trainers._judge import Judge
from streamrec.trainers._saved import describers, description, plain, require_parts, require_same, require_target
from streamrec.trainers._saver import Cut, Saver
from streamrec.trainers._stop import stop_on_signals
from streamrec.trainers.callbacks import Callback, Calls, Progress
from streamrec.trainers.drift import Drift
from streamrec.trainers.gate import Gate
from streamrec.trainers.held_rows import HeldRows
from streamrec.trainers.in_order import InOrder
from streamrec.trainers.plan import Plan, plan
from streamrec.trainers.tuner import LOOK, Tuner

__all__ = ["OnlineTrainer"]

FORMAT = 5
"""Of the checkpoints written here. Another one is refused."""


_PATIENCE = 0.1  # seconds: how long a source that waits keeps `run` from hearing a signal, or from a checkpoint

_USUAL = {Impression, Feedback}
_NO_SLOTS = np.empty(0, dtype=np.int64)
_NO_SCORES = np.empty(0, dtype=np.float32)
_DRAWS = 0x6E656761  # seeds the choice of non-clicks, so that it is not that of anything else that hashes ids


class OnlineTrainer:
    """Learns from a stream, event by event, each impression scored with all that came before it learned.

    An `Impression` is encoded, scored and held until `join` knows its label; then the score that was served is judged
    (the impression's own `score` where it came with one, else ours) and the row, as it was encoded then, is learned.
    `Labeled` items are scored, judged and learned at once. How the stream is cut into pushes changes no bit of
    anything. After an archive, it goes on with the model, the preprocessors and the join that a `BatchTrainer` used.

    `model`: learns the kind of feedback `target`; labels of other kinds are only judged. `preprocessors`: run in order
    before it; events that cannot be used at all never reach them, but go to `dead_letters`. `join`: without one,
    impressions are scored but not learned from, and counted. `metrics`: kept since the start and, with `window`, per so
    many seconds of event time. `store`: a `Store` or where to make one; None keeps nothing. `checkpoint_every`,
    `checkpoint_seconds`: `run` cuts a checkpoint and publishes a version after so many events or seconds on `clock`,
    whichever is first, and at its end. `background`: they are written in a thread, and the stream waits only while they
    are cut; one that is due while the one before is being written is cut as soon as that is done. False: the stream
    waits until they are written. `store_patience`: seconds on `clock` for which `run` goes on learning while the files
    of its store or its archive cannot be read or written, from the first checkpoint that fails; the next are tried when
    they are due, at most every five seconds, and once more at the end; 0: none may fail. `batch_size`: events `run`
    reads at once. `negatives`: the share of non-clicks to learn from, each with 1/share of its weight, so that
    calibration stays; the impression's id chooses. The metrics judge all of them. `early_negatives`: learn each
    impression as a non-click when it is shown and as a click when one comes, with the fake-negative weighted loss,
    instead of once when its window closes: see `docs/labels.md` for when that pays. The metrics wait for the label all
    the same. `archive`: an `Archive` or where to make one: every event that reaches the model, every label and every
    dead letter, exactly once, since its files belong to checkpoints. `gate`: tries each version before it is served.
    `drift`: watches the loss of the served scores and what is shown, and acts. `calibration`: makes probabilities of
    the model's scores, and learns that from labels of the target as they come; what is returned, judged and published
    is calibrated. `callbacks`: are told how it goes.

    >>> from streamrec import AUC, CTR, FM, Id, Memory, Schema
    >>> shown = [Impression(id=f"i{n}", time=float(n), user="u1", item=f"p{n % 2}") for n in range(100)]
    >>> trainer = OnlineTrainer(model=FM(Schema(Id("user"), Id("item")), dim=4), metrics=[AUC(), CTR()])
    >>> report = trainer.run(Memory([Labeled(one, label=float(one.item == "p1")) for one in shown]))
    >>> report.metrics["AUC"] > 0.9, report.metrics["CTR"], report.counts["learned"]
    (True, 0.5, 100)
    """

    def __init__(
        self,
        *,
        model: Model,
        preprocessors: Sequence[Stage] = (),
        join: LabelJoin | None = None,
        metrics: Sequence[Metric] = (),
        window: float | None = None,
        store: Store | str | os.PathLike[str] | None = None,
        checkpoint_every: int = 100_000,
        checkpoint_seconds: float = 60.0,
        background: bool = True,
        store_patience: float = 300.0,
        batch_size: int = 256,
        target: str = "click",
        negatives: float = 1.0,
        early_negatives: bool = False,
        archive: Archive | str | os.PathLike[str] | None = None,
        dead_letters: DeadLetters | None = None,
        gate: Gate | None = None,
        drift: Drift | None = None,
        calibration: Calibrator | None = None,
        callbacks: Sequence[Callback] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("checkpoint_every", checkpoint_every), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"{name} must be >= 1 event, got {value!r}")
        if not 0 < negatives <= 1:
            raise ConfigError(f"negatives must be a share in (0, 1], got {negatives!r}")
        if not checkpoint_seconds > 0:
            raise ConfigError(f"checkpoint_seconds must be > 0, got {checkpoint_seconds!r}")
        if not store_patience >= 0:
            raise ConfigError(f"store_patience must be >= 0 seconds, got {store_patience!r}")
        require_target(join, target)
        if early_negatives and join is None:
            raise ConfigError("early_negatives needs a join, which tells when clicks come: give a LabelJoin")
        self.model = model
        self.preprocessors = list(preprocessors)
        self.join = join
        self.validation = ProgressiveValidation(metrics, window=window)
        self.store = Store(store) if isinstance(store, (str, os.PathLike)) else store
        self.checkpoint_every = checkpoint_every
        self.checkpoint_seconds = checkpoint_seconds
        self.background = background
        self.store_patience = store_patience
        self.batch_size = batch_size
        self.target = target
        self.negatives = negatives
        self.early_negatives = early_negatives
        self.archive = Archive(archive) if isinstance(archive, (str, os.PathLike)) else archive
        if self.archive is not None and store is None:
            raise ConfigError("an archive is committed with checkpoints: give a store as well")
        self.dead_letters = DeadLetters() if dead_letters is None else dead_letters
        self._calls = Calls(callbacks)
        self._clock = clock
        self._validate = Validate()
        self._encoder = Encoder(model.schema)
        self._nothing = self._encoder([])
        self._saver = Saver(model)
        self._checkpoints = Checkpoints(self.store, self.archive, self._saver, clock, store_patience)
        self.gate = gate
        if gate is not None:
            if not (hasattr(model, "config") and hasattr(model, "from_config")):
                raise ConfigError(f"a gate needs a model that has config() and from_config(), {model!r} has not")
            gate.attach(self._require_store(), self._published)
        self._tuner = model if isinstance(model, Tuner) else None
        if calibration is not None and self._tuner is not None:
            raise ConfigError("a tuner's learners are judged as they are: calibrate the model that it finds")
        self.drift = drift
        if drift is not None:
            drift.require(model)
        self.calibration = calibration
        self._judge = Judge(self.validation, target, gate=gate, tuner=self._tuner, drift=drift, calibration=calibration)
        texts = sum(isinstance(field, Text) for field in model.schema)
        self._rows = HeldRows(texts, self._judge.notes, drawn=negatives < 1)
        ordered = isinstance(model, OrderedModel) and (not early_negatives or getattr(model, "weighs", False))
        self._step: Any = model.step if ordered else InOrder(model).step  # type: ignore[attr-defined]
        if self._tuner is not None:
            self._step = self._tuner.steps
        self._kinds = {"": 0, target: 1}  # their numbers in a plan; 0: nothing to judge
        joined = () if join is None else join.kinds
        self._numbers = np.array([self._kinds.setdefault(kind, len(self._kinds)) for kind in joined], dtype=np.int64)
        self._learned = joined.index(target) if join is not None else -1
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0
        self._lap = clock()
        self._take_over()

    def _take_over(self) -> None:
        """Hold what the join holds already, as a `BatchTrainer` leaves it, encoded; scored by the model as it is."""
        if self.join is not None:
            self.join.hand_over(self._hold)

    def _hold(self, shown: Sequence[Impression]) -> NDArray[np.int64]:
        batch, _ = self._encoder(shown)  # what cannot be used in them was reported when they came
        slots = self._rows.add(batch, batch.times)
        if self.negatives < 1:
            self._rows.draws[slots] = uniform([impression.id for impression in shown], _DRAWS)
        self._note(shown, batch, slots)
        scores = self.model.predict(batch) if self._tuner is None else self._tuner.predictions(batch)
        found = self._judge.said(scores, self._rows.notes, slots)
        if self.calibration is not None:
            found = self.calibration.apply(found)
        self._judge.calibrated(found, self._rows.notes, slots)
        self._rows.served[slots] = _served(found, shown)
        if self.archive is not None:
            self.archive.hold(slots, shown)
        return slots

    def _note(self, shown: Sequence[Impression], batch: Batch, slots: NDArray[np.int64]) -> None:
        """Keep what is to be known of these impressions when their labels come."""
        for column, notes in zip(self._rows.notes, self._judge.note(shown, batch), strict=False):
            column[slots] = notes

    # -- learning ------------------------------------------------------------------------------------------------------

    def push(self, events: Sequence[Item]) -> list[float]:
        """Take the next events; return the scores of its `Impression` and `Labeled` items, in order.

        A score is nan where its item did not reach the model: it could not be used, or a preprocessor dropped it.
        Nothing is written: `run` does that, or `checkpoint` when `checkpoint_due`.
        """
        scores = self._push(events) if self._tuner is None and self.drift is None else self._push_and_act(events)
        if self._calls:
            self._calls.tell("on_step_end", self._progress)
            if self._calls.due(self._counts["events"]):
                self._calls.log(self._progress, self.report())
        return scores

    @property
    def _progress(self) -> Progress:
        return Progress(self._counts["events"])

    def _push_and_act(self, events: Sequence[Item]) -> list[float]:
        scores = []
        begin = 0
        while begin < len(events):  # what is done about labels is done at the same events, however the stream is cut
            end = min(len(events), begin + LOOK - self._counts["events"] % LOOK)
            scores += self._push(piece_of(events, begin, end))
            begin = end
            if self._counts["events"] % LOOK == 0:
                if self._tuner is not None:
                    self._tuner.turn()
                if self.drift is not None:
                    self.drift.act(self.model)
        return scores

    def _push(self, events: Sequence[Item]) -> list[float]:
        checked = self._validate.push(events)
        usable: list[Any] = checked
        if type(checked) is not Decoded:
            usable = [item for item in checked if not isinstance(item, DeadLetter)]
        kept = usable
        for stage in self.preprocessors:
            kept = stage.push(kept)
        kinds = {*map(type, kept)}
        if self.archive is not None:
            self.archive.add(kept, lines_of(checked, kept) if kinds <= _USUAL else None)
        if not kinds <= _USUAL:
            shown = [e.impression if isinstance(e, Labeled) else e for e in kept if not isinstance(e, Feedback)]
        else:
            shown = [e for e in kept if type(e) is Impression]
        batch, problems = self._encoder(shown) if shown else self._nothing
        if self.drift is not None:
            self.drift.show(batch)
        scores = (self._learn_at_once if kinds == {Labeled} else self._advance)(kept, shown, batch)
        if len(kept) < len(events) or problems:
            places = places_of(checked, kept)
            for letter in letters_of(events, checked, shown, problems, places, self._counts["events"]):
                self.dead_letters.add(letter)
                if self.archive is not None:
                    self.archive.bury(letter)
            if len(kept) < len(events):
                found = dict(zip(places, scores, strict=False))
                scores = [
                    found.get(place, math.nan) for place, e in enumerate(events) if isinstance(e, (Impression, Labeled))
                ]
        self._counts["events"] += len(events)
        return scores

    def _advance(self, events: Sequence[Any], shown: Sequence[Impression], batch: Batch) -> list[float]:
        """Score, join, judge and learn, in the order of the events; return the scores. `batch`: those `shown` in
        them."""
        self._counts["impressions"] += len(shown)
        slots = self._rows.add(batch, batch.times) if shown else _NO_SLOTS
        if self.negatives < 1:
            self._rows.draws[slots] = uniform([impression.id for impression in shown], _DRAWS)
        if self._rows.notes and shown:
            self._note(shown, batch, slots)
        archive = self.archive if self.join is not None else None
        if archive is not None:
            archive.hold(slots, shown)
        kinds_here = dict(self._kinds)  # a copy: `Labeled` items may bring new kinds without end
        todo, closed = self._plan(events, slots, kinds_here)
        self._counts["learned"] += todo.learned
        self._counts["sampled_out"] += todo.sampled_out
        found = _NO_SCORES
        if len(todo.rows):
            scores = self._step(self._rows.batch, todo.rows, todo.ops, todo.labels, todo.weights)
            found = self._judge.said(scores[todo.scored], self._rows.notes, slots)
        if self.calibration is not None:
            mine = todo.judged_kinds == self._kinds[self.target]
            raw = self._judge.raw(self._rows.notes, todo.judged_rows[mine])
            labeled = (todo.judged_after[mine], todo.judged_labels[mine], raw)
            found = self.calibration.advance(found, *labeled, todo.judged_weights[mine])
        self._judge.calibrated(found, self._rows.notes, slots)
        self._rows.served[slots] = _served(found, shown)
        if len(todo.judged_rows):
            which = todo.judged_kinds
            names = list(kinds_here)
            self._judge.update(
                todo.judged_labels,
                self._rows.served[todo.judged_rows],
                todo.judged_weights,
                self._rows.times[todo.judged_rows],
                names[which[0]] if (which == which[0]).all() else [names[kind] for kind in which.tolist()],
                [column[todo.judged_rows] for column in self._rows.notes],
                self._rows.batch,
                todo.judged_rows,
            )
        if archive is not None and self.join is not None and closed is not None:
            archive.label(closed, self.join.kinds, self._rows.served, todo.freed)
        self._rows.free(todo.freed)
        return found.tolist()

    def _learn_at_once(self, events: Sequence[Labeled], shown: Sequence[Impression], batch: Batch) -> list[float]:
        """`_advance` where nothing waits for a label: no row need be held."""
        count = len(events)
        self._counts["impressions"] += count
        labels = np.array([event.label for event in events], dtype=np.float32)
        weights = np.array([event.weight for event in events], dtype=np.float32)
        kinds = [event.kind for event in events]
        first = kinds[0]
        one_kind = kinds.count(first) == count
        learn_weights = weights  # the metrics judge every label, with its own weight
        if one_kind and first == self.target and self.negatives == 1:
            ops = np.full(count, SCORE | LEARN, dtype=np.int8)
            self._counts["learned"] += count
        else:
            learned = np.array([kind == self.target for kind in kinds])
            if self.negatives < 1:
                negative = learned & (labels == 0)
                dropped = negative & (uniform([one.id for one in shown], _DRAWS) >= self.negatives)
                learn_weights = np.where(negative, weights / np.float32(self.negatives), weights)
                learned &= ~dropped
                self._counts["sampled_out"] += int(np.count_nonzero(dropped))
            ops = np.where(learned, SCORE | LEARN, SCORE).astype(np.int8)
            self._counts["learned"] += int(np.count_nonzero(learned))
        notes = self._judge.noted(shown, batch)
        every: Any = slice(None)
        rows = np.arange(count)
        found = self._judge.said(self._step(batch, rows, ops, labels, learn_weights), notes, every)
        if self.calibration is not None:
            mine = np.flatnonzero([kind == self.target for kind in kinds])
            found = self.calibration.advance(found, mine + 1, labels[mine], found[mine], weights[mine])
        self._judge.calibrated(found, notes, every)
        served = _served(found, shown)
        judged = every if "" not in kinds else np.flatnonzero([kind != "" for kind in kinds])
        if first or not one_kind:
            self._judge.update(
                labels[judged],
                served[judged],
                weights[judged],
                batch.times[judged],
                first if one_kind else [kind for kind in kinds if kind],
                [column[judged] for column in notes],
                batch,
                rows[judged],
            )
        scores: list[float] = found.tolist()
        return scores

    def _plan(
        self, events: Sequence[Any], slots: NDArray[np.int64], kinds: dict[str, int]
    ) -> tuple[Plan, NDArray[Any] | None]:
        """What these events ask for, in order, and what the join says. `kinds`: their numbers; new ones are added."""
        join = self.join
        codes = event_codes(events, {}) if join is None else join.codes(events)
        closed = None
        if join is not None:
            payloads = np.zeros(len(codes), dtype=np.int64)
            payloads[codes < UNKNOWN] = slots
            closed = join.steps(events, codes, payloads, at_once=self.early_negatives)
        else:
            self._counts["unjoined"] += int(np.count_nonzero(codes != PASSED))
        given = None
        if (codes == PASSED).any():
            labeled = [event for event in events if isinstance(event, Labeled)]
            given = (
                np.array([event.label for event in labeled], dtype=np.float32),
                np.array([event.weight for event in labeled], dtype=np.float32),
                np.array([kinds.setdefault(event.kind, len(kinds)) for event in labeled], dtype=np.int64),
                np.array([event.kind == self.target for event in labeled], dtype=np.bool_),
            )
        numbers = self._numbers, self._learned
        draws, early = self._rows.draws, self.early_negatives
        return plan(codes, slots, closed, *numbers, given, draws, self.negatives, early), closed

    # -- a whole source ------------------------------------------------------------------------------------------------

    def run(self, source: Source, limit: int | None = None) -> Report:
        """Learn from `source`, going on from the newest checkpoint of the store, until it ends or `limit` events
        are read.

        SIGTERM and SIGINT end it between two micro-batches, or while a source with `wait` has nothing; what is due is
        saved then, too. At its end it cuts a checkpoint and publishes, if there is a store and there was anything to
        read; an error of the source ends it at once, when what is being written has been. A checkpoint whose files
        cannot be written does not end it before `store_patience` is over; the report counts it as `failed_checkpoints`,
        and it is logged once. Where the run begins and at its end, the store has to be there: raises `StoreError`. A
        progress bar is drawn where standard error is a terminal.
        """
        self._lap = self._clock()
        self._checkpoints.follow(source)
        if not self._counts["events"]:
            position = self.resume()
            if position is not None:
                source.seek(position)
        with self.training():
            interrupted = self._run_to_its_end(source, limit)
        return self.report(interrupted=interrupted)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Tell the callbacks that a training begins here, and at its end all that they have not heard: around a loop of
        your own; `run` does it."""
        self._calls.go_on(self._progress)
        try:
            yield
            if self._calls:
                self._calls.log(self._progress, self.report(), all_of_them=True)
        finally:
            self._calls.tell("on_train_end", self._progress)

    def _run_to_its_end(self, source: Source, limit: int | None) -> bool:
        try:
            interrupted = self._run(source, limit)
        except BaseException:
            with suppress(Exception):  # what ends the run is the first error
                self._checkpoints.finish()
            raise
        try:
            self._checkpoints.finish()
        except StoreError as error:
            self.bear(error)  # the last one, below, holds what this one has
        self._take_lap()
        if self.store is not None and self._counts["events"] > self._checkpoints.events:
            self.checkpoint(source.position())
            self._take_lap()
        self._checkpoints.release()
        self._tell_saved()
        return interrupted

    def _run(self, source: Source, limit: int | None) -> bool:
        """Learn from `source` and cut checkpoints on the way; true where a signal has ended it."""
        read = 0
        wait = getattr(source, "wait", None)
        with stop_on_signals() as stop, Bar(total=limit, unit=" events", unit_scale=True, disable=None) as bar:
            while not stop.is_set() and (limit is None or read < limit):
                if wait is None or wait(_PATIENCE):
                    events = source.read(self.batch_size if limit is None else min(self.batch_size, limit - read))
                    if not events:
                        break
                    self.push(events)
                    read += len(events)
                    bar.update(len(events))
                elif self._counts["events"] == self._checkpoints.events:
                    continue  # nothing has come since the last one
                self._tell_saved()
                try:
                    saved = self._save_when_due(source)
                except StoreError as error:
                    self.bear(error)
                else:
                    if saved:
                        bar.set_postfix(self.validation.compute(), refresh=False)
            return stop.is_set()

    def _save_when_due(self, source: Source) -> bool:
        """Save, or begin to; false where nothing is due, or not yet possible. Raises what went wrong with the last."""
        # what the learner goes on from hangs on it, so it does not hang on how fast a disk is
        at_once = not self.background or (self.gate is not None and self.gate.regressed)
        if not ((at_once or not self._checkpoints.busy) and self.checkpoint_due):
            return False
        if not at_once and not self._saver.prepared():
            return False
        self._take_lap()
        self._checkpoints.release()
        position = source.position()
        if at_once:
            self.checkpoint(position)
        else:
            self._checkpoints.write_behind(self._cut(position), position, self._counts["events"])
        return True

    def _tell_saved(self) -> None:
        """Tell the callbacks of checkpoints that have come to be on disk."""
        for events, version in self._checkpoints.taken():
            self._calls.tell("on_save", Progress(events), version)

    def _take_lap(self) -> None:
        """Add to the seconds of all runs, which a checkpoint holds."""
        now = self._clock()
        self._seconds += now - self._lap
        self._lap = now

    def report(self, *, interrupted: bool = False) -> Report:
        """The metrics, and what became of every event."""
        counts = Counter({"events": self._counts["events"], "impressions": self._counts["impressions"]})
        counts["learned"] = self._counts["learned"] - getattr(self.model, "left_out", 0)
        counts["pending"] = 0 if self.join is None else self.join.pending
        counts["left_out"] = getattr(self.model, "left_out", 0)
        counts["unjoined"] = self._counts["unjoined"]
        counts["sampled_out"] = self._counts["sampled_out"]
        counts["unlearned"] = self._counts["unlearned"]
        counts["corrected"] = 0 if self.join is None else self.join.corrected
        if self.drift is not None:
            counts["drift"] = self.drift.count
        if self._calls.errors:
            counts["callback_errors"] = self._calls.errors
        if self._checkpoints.outage.failed:
            counts["failed_checkpoints"] = self._checkpoints.outage.failed
        for part in (*self.preprocessors, self.join, self.dead_letters):
            if part is not None:
                counts.update(part.counts)
        return Report(
            self.validation.compute(),
            dict(counts),
            self.validation.windows(),
            self._seconds,
            interrupted=interrupted,
            intervals=self.validation.intervals(),
            curves=self.validation.curves(),
        )

    # -- saving --------------------------------------------------------------------------------------------------------

    @property
    def checkpoint_due(self) -> bool:
        """Whether there is a store, and `checkpoint_every` events or `checkpoint_seconds` have passed since the last
        one, or the gate has something to decide. After one that failed (see `bear`) none is for five seconds."""
        every = 0 if self.gate is not None and self.gate.due else self.checkpoint_every
        return self._checkpoints.due(self._counts["events"], every, self.checkpoint_seconds)

    def checkpoint(self, position: Position | None = None) -> Version:
        """Save all that a resumed run needs, with the source's `position`, and publish. Raises `StoreError`, at once:
        `bear` goes on after it."""
        self._require_store()
        self._checkpoints.finish()
        version = self._checkpoints.write(self._cut(position), position, self._counts["events"])
        self._tell_saved()
        return version

    def bear(self, error: StoreError) -> None:
        """Go on after a checkpoint that failed with `error`, in a loop of your own; `run` does it.

        It is counted, and `checkpoint_due` says when to try again. Raises `error` where its files can be read and
        written, so that it would not pass, and when `store_patience` is over.
        """
        self._checkpoints.bear(error, self._counts["events"])

    def _cut(self, position: Position | None) -> tuple[Cut, Cut]:
        """What is to be published and what is to be saved, at one instant: copies. The gate decides before."""
        if self.gate is not None:
            self.gate.decide(self._go_back, saved=self._checkpoints.begin())
        part = 0 if self.archive is None else self.archive.cut()
        model, base, copied = self._saver.cut(published=False)
        info = {"model": description(self.model), "metrics": plain(self.validation.compute()), "archive": part}
        state = {**self._state(model), "position": position}
        return self._cut_published(), Cut(state, info, base, published=False, copied=copied)

    def _go_back(self, version: int) -> Callable[[], None]:
        """Read what the model and its calibration were when this version was cut. Raises `StoreError`."""
        store = self._require_store()
        _, state = store.checkpoints.read(store.checkpoint_of(version))  # type: ignore[misc]  # a gate has looked
        return lambda: self._take_back(state)

    def _take_back(self, state: State) -> None:
        """Take the model and its calibration from this checkpoint, and count what was learned since.

        The source, the join, the preprocessors and the metrics stay as they are: no event comes twice.
        """
        rungs = None if self._tuner is None else self._tuner.rungs
        self._saver.forget()
        self.model.load_state_dict(state["model"])
        if self._tuner is not None and rungs is not None:
            self._tuner.rungs = rungs + 1  # what was scored by learners that are gone judges none of these
        if self.calibration is not None:
            self.calibration.load_state_dict(state["calibration"])
        if self.drift is not None:
            self.drift.set_rate(self.model)
        known = self._counts["learned"] - self._counts["unlearned"]
        known_then = state["counts"]["learned"] - state["counts"].get("unlearned", 0)
        self._counts["unlearned"] += known - known_then

    def _cut_published(self) -> Cut:
        model, base, copied = self._saver.cut(published=True)
        info = {
            "model": description(self._served_model),
            "metrics": plain(self.validation.compute()),
            "events": self._counts["events"],
        }
        state: dict[str, Any] = {"model": model}
        stages = describers(self.preprocessors)
        if stages:
            info["stages"] = [{"type": type(stage).__name__, "config": stage.config()} for stage in stages]
            state["stages"] = [stage.published() for stage in stages]
        if self.calibration is not None:
            info["calibration"] = {"type": type(self.calibration).__name__, "config": self.calibration.config()}
            state["calibration"] = self.calibration.state_dict()
        return Cut(state, info, base, published=True, copied=copied)

    @property
    def _served_model(self) -> Model:
        """The model, or the learner of a tuner that serves: what versions are of."""
        return self.model if self._tuner is None else self._tuner.leader

    def publish(self) -> Version:
        """Save the model as a version for scorers. Raises `StoreError`."""
        shelf = self._require_store().versions
        self._checkpoints.finish()
        version = self._saver.write(shelf, self._cut_published())
        self._saver.compact(shelf, published=True)
        return version

    def resume(self) -> Position | None:
        """Become what the newest good checkpoint was cut from; return the position of the source then.

        None where there is no store, no checkpoint, or it was cut without a position. Raises `SchemaError` or
        `ConfigError` where the model differs from the one that was saved.
        """
        found = self.store.checkpoints.read() if self.store is not None else None
        if found is None:
            return None
        version, state = found
        require_same(self.model, version.info["model"], what=f"checkpoint {version.number}")
        if version.info.get("trainer") == "BatchTrainer":
            self._follow(state, what=f"{self.store.uri}: checkpoint {version.number}")  # type: ignore[union-attr]
            return None
        self.load_state_dict(state)
        self._saver.resumed(version)
        self._checkpoints.resumed(version)
        position: Position | None = state["position"]
        return position

    def _follow(self, state: State, what: str) -> None:
        """Go on where a `BatchTrainer` has ended, before the first event of the stream."""
        if not state["done"]:
            raise ConfigError(
                f"{what} is of a batch training that has not ended: run that BatchTrainer again, or use another store"
            )
        self._saver.forget()
        self.model.load_state_dict(state["model"])
        left = state["rows"]
        if "join" in left:  # it was trained on events
            require_parts(left, self.preprocessors, self.join)
            for stage, saved in zip(self.preprocessors, left["preprocessors"], strict=True):
                stage.load_state_dict(saved["state"])
            self._validate.load_state_dict(left["validate"])
            if self.join is not None:
                self.join.load_state_dict(left["join"])
                self._take_over()

    def forget(self, user: str, position: Position | None = None) -> Mapping[str, int]:
        """Forget a user, in memory and in all files: rows of the model, histories, what waits for a label, dead
        letters, the archive. Then a checkpoint is saved with the source's `position`, a version published, and all
        older ones are removed. Returns how many rows went, by where they were.

        A user behind `Pseudonymize` is named as in front of it. What the model has learned about items, and its
        metrics, stays. Call it between two pushes. Raises `ConfigError` where a model cannot forget, `StoreError`.
        """
        self._checkpoints.finish()
        gone: Counter[str] = Counter()
        for name in names_of(user, self.preprocessors):
            parts = self.model, self._encoder, self._rows, self.join, self.archive
            gone["rows"] += forget_rows(name, *parts)
            for stage in self.preprocessors:
                gone[type(stage).__name__] += getattr(stage, "forget", lambda _: 0)(name)
            gone["dead_letters"] += purge_letters(name, self.dead_letters)
        if self.gate is not None:
            self.gate.forget()
        if self.drift is not None:
            self.drift.forget()
        self._saver.forget()
        if self.store is not None:
            self.checkpoint(position)
            if self.archive is not None:
                for name in names_of(user, self.preprocessors):
                    gone["archive"] += self.archive.forget(name)
            if self.store.served.pinned() is not None:
                self.store.served.follow(why="a user was forgotten, of whom the version before may know")
            self.store.checkpoints.only_newest()
            self.store.versions.only_newest()
        return dict(gone)

    def state_dict(self) -> State:
        """Everything, cut now: model, open joins and their rows, preprocessors, metrics, counts, dead letters."""
        return self._state(self.model.state_dict())

    def _state(self, model: State) -> dict[str, Any]:
        """Everything, given the model's state or its changes."""
        return {
            "format": FORMAT,
            "model": model,
            "rows": self._rows.state_dict(),
            "join": None if self.join is None else self.join.state_dict(),
            "validate": self._validate.state_dict(),
            "preprocessors": [
                {"type": type(stage).__name__, "state": stage.state_dict()} for stage in self.preprocessors
            ],
            "metrics": self.validation.state_dict(),
            "dead_letters": self.dead_letters.state_dict(),
            "gate": None if self.gate is None else self.gate.state_dict(),
            "drift": None if self.drift is None else self.drift.state_dict(),
            "calibration": None if self.calibration is None else self.calibration.state_dict(),
            "archive": None if self.archive is None else self.archive.state_dict(),
            "counts": dict(self._counts),
            "seconds": self._seconds,
        }

    def load_state_dict(self, state: State) -> None:
        """Become what `state` was cut from. Raises `ConfigError` where the parts differ from those saved."""
        if state["format"] != FORMAT:
            raise StoreError(f"the checkpoint has format {state['format']!r}, this streamrec reads format {FORMAT}")
        require_parts(state, self.preprocessors, self.join)
        if (state.get("calibration") is None) != (self.calibration is None):
            raise ConfigError(
                f"the checkpoint was cut {'with' if self.calibration is None else 'without'} a calibration; "
                "build the trainer as then, or use an empty store"
            )
        self._checkpoints.finish()
        self._saver.forget()
        self.model.load_state_dict(state["model"])
        self._rows.load_state_dict(state["rows"])
        if self.join is not None:
            self.join.load_state_dict(state["join"])
        self._validate.load_state_dict(state["validate"])
        for stage, saved in zip(self.preprocessors, state["preprocessors"], strict=True):
            stage.load_state_dict(saved["state"])
        self.validation.load_state_dict(state["metrics"])
        self.dead_letters.load_state_dict(state["dead_letters"])
        if self.gate is not None:
            self.gate.load_state_dict(state["gate"])
        if self.drift is not None and state.get("drift") is not None:
            self.drift.load_state_dict(state["drift"])
            self.drift.set_rate(self.model)
        if self.calibration is not None:
            self.calibration.load_state_dict(state["calibration"])
        if self.archive is not None and state["archive"] is not None:
            self.archive.load_state_dict(state["archive"])
        self._counts = Counter(state["counts"])
        self._seconds = state["seconds"]
        self._checkpoints.count_from(self._counts["events"])

    def _published(self, number: int) -> Any:
        """The model of a version that this trainer has published. Raises `StoreError`."""
        version, state = self._require_store().versions.read(number)  # type: ignore[misc]  # it raises instead
        model: Model = type(self._served_model).from_config(version.info["model"]["config"])  # type: ignore[attr-defined]
        model.load_state_dict(state["model"])
        if "calibration" in version.info:
            return Calibrated(model, calibrator_from(version.info["calibration"], state["calibration"]))
        return model

    def _require_store(self) -> Store:
        return self._checkpoints.require_store()


def _served(found: NDArray[np.float32], shown: Sequence[Impression]) -> NDArray[np.float32]:
    """The scores to be judged: those that were served, where a service has served one, else what was `found`."""
    given = [impression.score for impression in shown]
    if given.count(None) == len(given):
        return found
    return np.array([ours if one is None else one for ours, one in zip(found, given, strict=True)], dtype=np.float32)
