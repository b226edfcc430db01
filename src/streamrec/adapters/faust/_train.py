"""train: a topic feeds a trainer, exactly once, in one of the workers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import msgspec

from streamrec.adapters.faust._gate import Gate
from streamrec.adapters.faust._outbox import Message
from streamrec.adapters.faust._owner import NotOwner, Owner, Reading, Underway
from streamrec.errors import ConfigError, StoreError
from streamrec.events import DeadLetter, Event, Position, decode_event
from streamrec.preprocessors import DeadLetters
from streamrec.sources import Kafka
from streamrec.trainers import OnlineTrainer

__all__ = ["Notice", "train"]

log = logging.getLogger(__name__)

_MOST_LETTERS = 256  # on their way to the broker


class Notice(msgspec.Struct, frozen=True):
    """Word that a version has been published: which store, which number."""

    store: str
    version: int


def train(
    app: Any,
    topic: Any,
    trainer: OnlineTrainer,
    *,
    batch: int = 256,
    seconds: float = 0.5,
    decode: Callable[[bytes], Event] = decode_event,
    dead_letters: str | None = None,
    notices: str | None = None,
    prefetch: int = 10_000,
    timeout: float = 30.0,
    client: Mapping[str, Any] | None = None,
) -> None:
    """Let `trainer` learn from `topic` while the worker runs: each event exactly once, however often it is killed.

    Offsets are part of the trainer's checkpoints, so it needs a store. The messages are read by
    `streamrec.sources.Kafka` on a thread of its own, beside Faust's consumer, and learned on one more; the app's event
    loop waits for neither. Pushed is what has come, at most `batch` events; the thread looks around every `seconds`
    without any. At most `prefetch` messages are held ahead: while as many wait, nothing more is fetched.

    Of several workers that call this with the same app id and topic **one** learns, for a model has one owner; the
    others stand by. When it leaves or dies, another takes over from the newest checkpoint in the store, which they
    share. After each checkpoint its offsets are committed to the group `"{app id}-{topic}-trainer"`, from which
    nothing is read: it shows the lag, and it keeps a worker that was declared dead from writing.

    `dead_letters`: a topic for messages that do not decode, or are refused as no events, with the headers `topic`,
    `partition`, `offset` and `reason`, sent before the checkpoint behind them; one that is too large for that topic is
    cut, and its size is in the header `cut`. `notices`: a topic that is told of every published version, for
    `streamrec.serving.StoreNotifier`. `timeout`: seconds without an answer from a broker, whatever it was asked, after
    which the worker crashes with a `SourceError` that says what that was; until then it is tried again. It holds for
    the app's start as well. `client`: more settings for aiokafka. How long a dead worker goes unnoticed is the app's
    `broker_session_timeout`, in seconds.

    While the store cannot be reached or written the worker goes on learning, for the trainer's `store_patience`; its
    offsets stay where the last checkpoint is. Then, where it is told to end meanwhile, and by any other error of the
    store or of the trainer, it crashes: start it again and it goes on from the last checkpoint. The app's monitor
    counts `streamrec_events`, `streamrec_dead_letters`, `streamrec_checkpoints`.

    Raises `ConfigError` where the trainer has no store, or a setting cannot work.
    """
    if trainer.store is None:
        raise ConfigError(
            'the offsets are kept in the trainer\'s checkpoints: give it a store, such as store="runs/ctr"'
        )
    reading = Reading(
        topic, batch=batch, seconds=seconds, decode=decode, dead_letters=dead_letters, prefetch=prefetch,
        timeout=timeout, client=client,
    )  # fmt: skip

    class Trainer(_Trainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(app, trainer, reading, notices, **kwargs)

    Gate.before(app, (reading.topic,), timeout, reading.client)
    app.service(Trainer)


class _Trainer(Owner):
    """Owns the trainer while this worker is elected, and stands by while it is not."""

    def __init__(self, app: Any, trainer: OnlineTrainer, reading: Reading, notices: str | None, **kwargs: Any) -> None:
        assert trainer.store is not None
        self._trainer, self._store, self._notices = trainer, trainer.store, notices
        self._version = 0  # of the newest checkpoint that is in memory; 0: none
        self._saved: Position = {}
        self._notice: Future[Any] | None = None  # on its way
        group = f"{app.conf.id}-{reading.topic}-trainer"
        super().__init__(app, reading, group, lambda: self._version, **kwargs)

    def given_up(self) -> None:
        self._version = 0

    def jobs(self, partitions: Sequence[int]) -> Sequence[Callable[[], None]]:
        return [self._learn]

    def _learn(self) -> None:
        trainer, underway = self._trainer, Underway(self, _MOST_LETTERS)
        with self.source() as source, _heard(trainer.dead_letters) as letters:
            newest = self._store.checkpoints.latest()
            if newest is not None and newest.number != self._version:
                self._saved = trainer.resume() or {}
                self._version = newest.number
            elif newest is None and trainer.report().counts["events"]:
                raise StoreError(
                    "the store is empty, but the trainer has learned already: cut a checkpoint before the app starts"
                )
            if self._saved:
                source.seek(self._saved)
            else:
                self._saved = source.position()
            log.info("this worker owns %r and learns from it, from %s", self.reading.topic, self._saved)
            with trainer.training():
                self._learn_from(source, letters, underway)

    def _learn_from(self, source: Kafka, letters: list[DeadLetter], underway: Underway) -> None:
        trainer = self._trainer
        at = self._saved
        while not self.enough.is_set():
            items = source.read(self.reading.batch)
            if items:
                trainer.push(items)
                at = source.position()
                self.count("streamrec_events", len(items))
                for letter in letters:
                    if "offset" in letter.position:  # of a message, not of a value without which it was learned
                        self.bury(letter, underway)
                letters.clear()
            if trainer.checkpoint_due and at != self._saved:
                try:
                    self._checkpoint(at, underway)
                except StoreError as error:
                    trainer.bear(error)
        if at != self._saved:
            self._checkpoint(at, underway)

    def _checkpoint(self, at: Position, underway: Underway) -> None:
        """Save, if this worker still owns the topic; raises `NotOwner` where it does not."""
        underway.wait()  # for the dead letters: behind the checkpoint, nobody would send them again
        # Twice, since a worker may sleep at any place: by the broker, and by what is in the store.
        self.commit(self._saved)
        newest = self._store.checkpoints.latest()
        if newest is not None and newest.number != self._version:
            raise NotOwner
        version = self._trainer.checkpoint(at)
        self._version, self._saved = version.number, at
        self.count("streamrec_checkpoints", 1)
        self.commit(at)
        self._tell()

    def _tell(self) -> None:
        """Send a notice of the newest version. Nothing waits for it: who misses it looks by itself, later."""
        published = self._store.versions.latest()
        if self._notices is None or published is None:
            return
        if self._notice is not None and not self._notice.done():
            log.warning("no notice of version %d: topic %r has not taken the last one", published.number, self._notices)
            return
        message = Message(b"version", msgspec.json.encode(Notice(self._store.uri, published.number)))
        self._notice = self.ask(self.outbox.send(self._notices, [message]))


@contextmanager
def _heard(of: DeadLetters) -> Iterator[list[DeadLetter]]:
    """A list to which every dead letter is added, whole."""
    letters: list[DeadLetter] = []
    listener = letters.append
    of.listeners.append(listener)
    try:
        yield letters
    finally:
        of.listeners.remove(listener)
