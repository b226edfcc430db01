"""join: impressions and feedback on one topic become labelled examples on another, on as many workers as there are."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from streamrec.adapters.faust._gate import Gate
from streamrec.adapters.faust._outbox import Message
from streamrec.adapters.faust._owner import NotOwner, Owner, Reading, Underway
from streamrec.adapters.faust._topics import topic_name
from streamrec.errors import ConfigError
from streamrec.events import DeadLetter, Event, Labeled, Position, decode_event, encode_event, place_of
from streamrec.preprocessors import LabelJoin, Validate
from streamrec.protocols import Stage, State
from streamrec.storage import Store

__all__ = ["join"]

log = logging.getLogger(__name__)

_MOST_BATCHES = 16  # of examples, or dead letters, on their way to the broker; from one partition


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
    without events: its last impressions stay open until one comes. An example that is too large for its topic is a
    dead letter.

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

    Gate.before(app, (reading.topic,), timeout, reading.client)
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
            underway = Underway(self, _MOST_BATCHES)
            at, cut = saved, time.monotonic()
            while not self.enough.is_set():
                items = source.read(self.reading.batch)
                if items:
                    self._take(chain, number, items, underway)
                    at = source.position()
                    self.count("streamrec_joined", len(items))
                if at != saved and time.monotonic() - cut >= self._every:
                    version, saved, cut = self._cut(shelf, version, chain, saved, at, underway), at, time.monotonic()
            if at != saved:
                self._cut(shelf, version, chain, saved, at, underway)

    def _take(self, chain: Sequence[Any], number: int, items: Sequence[Any], underway: Underway) -> None:
        """Push through the stages, and send what comes out."""
        checked: Sequence[Any] = chain[0].push(items)
        kept: Sequence[Any] = [one for one in checked if not isinstance(one, DeadLetter)]
        if len(kept) < len(checked):
            for place, one in enumerate(checked):
                if isinstance(one, DeadLetter):
                    self.bury(DeadLetter(one.position or place_of(items, place) or {}, one.reason, one.raw), underway)
        for stage in chain[1:]:
            kept = stage.push(kept)
        if kept:
            self.count("streamrec_examples", len(kept))
            underway.add(self.ask(self._send(number, kept)), f"the examples for topic {self._examples!r}")

    async def _send(self, number: int, examples: Sequence[Labeled]) -> None:
        messages = [_message(one) for one in examples]
        for place in await self.outbox.send(self._examples, messages):
            raw, topic = messages[place].value, self.reading.dead_letters
            where = {"topic": self.reading.topic, "partition": number, "impression_id": examples[place].impression.id}
            self.count("streamrec_dead_letters", 1)
            log.warning("an example is too large for topic %r: %d bytes, of %s", self._examples, len(raw), where)
            if topic is not None:
                reason = f"too large: an example of {len(raw)} bytes, more than topic {self._examples!r} takes"
                await self.outbox.bury(topic, DeadLetter(where, reason, raw))

    def _cut(
        self,
        shelf: Any,
        version: int,
        chain: Sequence[Stage],
        saved: Position,
        at: Position,
        underway: Underway,
    ) -> int:
        """Save, if the partition is still this worker's; returns the number of what was written."""
        underway.wait()
        self.commit(saved)
        newest = shelf.latest()
        if (0 if newest is None else newest.number) != version:
            raise NotOwner
        state: State = {"position": at, "stages": [stage.state_dict() for stage in chain]}
        number: int = shelf.write(state, {}).number
        self.commit(at)
        return number


def _message(example: Labeled) -> Message:
    return Message(example.impression.id.encode("utf-8", "surrogatepass"), encode_event(example))
