"""join: impressions and feedback on one topic become labelled examples on another, on as many workers as there are."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from streamrec.adapters.faust._owner import MOST_SENT, NotOwner, Owner, Reading
from streamrec.adapters.faust._topics import send_all, topic_name
from streamrec.errors import ConfigError
from streamrec.events import DeadLetter, Event, Labeled, Position, decode_event, encode_event
from streamrec.preprocessors import LabelJoin, Validate
from streamrec.protocols import Stage, State
from streamrec.storage import Store

__all__ = ["join"]

log = logging.getLogger(__name__)


def join(
    app: Any,
    topic: Any,
    examples: Any,
    stages: Callable[[], Sequence[Stage]],
    *,
    store: str,
    checkpoint_seconds: float = 10.0,
    batch: int = 256,
    seconds: float = 0.5,
    decode: Callable[[bytes], Event] = decode_event,
    dead_letters: str | None = None,
    prefetch: int = 10_000,
    timeout: float = 30.0,
    client: Mapping[str, Any] | None = None,
) -> None:
    """Join the impressions and the feedback of `topic`, and send the labelled examples to the topic `examples`.

    For platforms on which one trainer cannot do the joining as well: the partitions of `topic` are shared among all
    workers that call this with the same app id. An impression and its feedback must come with the impression's id as
    the key, so that they are in one partition. A trainer without a join learns from `examples`, by `train`.

    `stages`: makes what the events of one partition pass, the last one a `LabelJoin`. `store`: a folder or any fsspec
    URI, shared by the workers, one part in it for each partition: what the stages remember and the next offset, one
    cut, every `checkpoint_seconds` in which there was something to read. A worker that takes a partition over goes on
    from there.

    Examples are sent **at least once**, in the order of their partition: those since the last cut come again after a
    crash, the same ones. So give the trainer behind it a `Dedup` whose `ttl` and `capacity` cover what a joiner reads
    in `checkpoint_seconds` and while it catches up; then each is learned once. Time stands still in a partition
    without events: its last impressions stay open until one comes.

    The app's monitor counts `streamrec_joined` events and `streamrec_examples`. Lag: the group
    `"{app id}-{topic}-join"`. The rest is as in `train`. One thread and one connection a partition.

    Raises `ConfigError` where the last stage is no `LabelJoin`, or a setting cannot work.
    """
    if not checkpoint_seconds > 0:
        raise ConfigError(f"checkpoint_seconds must be > 0, got {checkpoint_seconds!r}")
    made = list(stages())
    if not made or not isinstance(made[-1], LabelJoin):
        raise ConfigError(f"the last of the stages must be a LabelJoin, got {made!r}")
    reading = Reading(
        topic, batch=batch, seconds=seconds, decode=decode, dead_letters=dead_letters, prefetch=prefetch,
        timeout=timeout, client=client,
    )  # fmt: skip
    to = topic_name(examples)

    class Joiner(_Joiner):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(app, reading, to, stages, store, checkpoint_seconds, **kwargs)

    app.service(Joiner)


class _Joiner(Owner):
    """Joins the partitions that are this worker's."""

    def __init__(
        self,
        app: Any,
        reading: Reading,
        examples: str,
        stages: Callable[[], Sequence[Stage]],
        store: str,
        every: float,
        **kwargs: Any,
    ) -> None:
        self._examples, self._stages, self._uri, self._every = examples, stages, store.rstrip("/"), every
        super().__init__(app, reading, f"{app.conf.id}-{reading.topic}-join", None, **kwargs)

    def jobs(self, partitions: Sequence[int]) -> Sequence[Callable[[], None]]:
        return [partial(self._join, number) for number in partitions]

    def _join(self, number: int) -> None:
        """One partition, until there is enough."""
        chain = [Validate(), *self._stages()]
        shelf = Store(f"{self._uri}/{number}").checkpoints
        with self.source([number]) as source:
            found = shelf.read()
            version = 0
            saved: Position
            if found is not None:
                version, saved = found[0].number, found[1]["position"]
                for stage, state in zip(chain, found[1]["stages"], strict=True):
                    stage.load_state_dict(state)
                source.seek(saved)
            else:
                saved = source.position()
            log.info("this worker joins %r, partition %d, from %s", self.reading.topic, number, saved)
            waiting: list[Future[Any]] = []
            at, cut = saved, time.monotonic()
            while not self.enough.is_set():
                items = source.read(self.reading.batch)
                if items:
                    waiting += self.told(items)
                    waiting += self._sent(chain, number, items)
                    at = source.position()
                    self.count("streamrec_joined", len(items))
                    while len(waiting) > MOST_SENT:
                        waiting.pop(0).result(self.reading.timeout)
                if at != saved and time.monotonic() - cut >= self._every:
                    version, saved, cut = self._cut(shelf, version, chain, saved, at, waiting), at, time.monotonic()
            if at != saved:
                self._cut(shelf, version, chain, saved, at, waiting)

    def _sent(self, chain: Sequence[Any], number: int, items: Sequence[Any]) -> list[Future[Any]]:
        """Push through the stages, and send what comes out."""
        checked: Sequence[Any] = chain[0].push([one for one in items if not isinstance(one, DeadLetter)])
        refused = [one for one in checked if isinstance(one, DeadLetter)]
        where = {"topic": self.reading.topic, "partition": number}
        letters = self.told([DeadLetter(where, one.reason, one.raw) for one in refused])
        kept: Sequence[Any] = [one for one in checked if not isinstance(one, DeadLetter)]
        for stage in chain[1:]:
            kept = stage.push(kept)
        if not kept:
            return letters
        self.count("streamrec_examples", len(kept))
        return [*letters, self.ask(send_all(self.app, self._examples, [_message(one) for one in kept]))]

    def _cut(
        self,
        shelf: Any,
        version: int,
        chain: Sequence[Stage],
        saved: Position,
        at: Position,
        waiting: list[Future[Any]],
    ) -> int:
        """Save, if the partition is still this worker's; returns the number of what was written."""
        for sent in waiting:
            sent.result(self.reading.timeout)
        waiting.clear()
        self.commit(saved)
        newest = shelf.latest()
        if (0 if newest is None else newest.number) != version:
            raise NotOwner
        state: State = {"position": at, "stages": [stage.state_dict() for stage in chain]}
        number: int = shelf.write(state, {}).number
        self.commit(at)
        return number


def _message(example: Labeled) -> tuple[bytes, bytes]:
    return example.impression.id.encode("utf-8", "surrogatepass"), encode_event(example)
