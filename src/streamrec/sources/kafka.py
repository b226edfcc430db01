"""Kafka: events in the partitions of Kafka topics."""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from streamrec.errors import ConfigError, SourceError
from streamrec.events import Decoded, Event, Feedback, Impression, Item, Labeled, Placed, Position, decode_event
from streamrec.sources._closing import ClosedAtItsEnd
from streamrec.sources._kafka_connect import Partition, Plan
from streamrec.sources._kafka_link import Chunk, Link, letter
from streamrec.sources._waiting import signalled

__all__ = ["Kafka", "decode_message"]

_EVENTS = (Impression, Feedback, Labeled)


class Kafka(ClosedAtItsEnd):
    """A source over the partitions of one or more topics, resumable at every message.

    Offsets live in the checkpoint, with the weights, and nowhere else: the source assigns itself its partitions and
    joins no group, so a trainer that is killed at any moment goes on with the first message it has not learned from.

    `topics`: one or several. `bootstrap_servers`: `"host:port"`, or several. `decode` reads the value of one message;
    a message on which it raises, or without a value, is a `DeadLetter` with its topic, partition and offset, and the
    stream goes on. `partitions`: read only these, of each topic; None: all, and those that are added later.

    `follow`: False reads up to where the partitions ended when the source was opened, and then gives the empty list;
    True waits for more. A `read` that waits ends, with an empty list, when `close` is called, when SIGTERM or SIGINT
    comes (in the main thread), or after `idle` seconds without a message (None: never); so `OnlineTrainer.run` stops
    cleanly. `start`: where partitions without a position begin, `"earliest"` or `"latest"`.

    `timeout`: seconds without any answer from a broker after which `SourceError` is raised; until then it is tried
    again and again, so a broker may go away and come back. `prefetch`: messages held ahead, about. `group`: a
    consumer group whose committed offsets follow the positions that were asked for, so that lag can be watched with
    Kafka's own tools; nothing is ever read from it. `client`: more settings for `aiokafka.AIOKafkaConsumer`, such as
    `security_protocol`, `ssl_context`, `sasl_plain_username`.

    A position is `{topic: {partition: offset}}`, the offset being that of the next message. Messages of a partition
    come in its order. Partitions are merged by the times of their messages, some 64 messages at a time and as far as
    they have arrived, so that none runs far ahead of the others; two runs may merge them differently. Where a topic no
    longer holds the messages at a position, because of its retention, a `DeadLetter` says which ones are lost and the
    rest is read.

    A thread of its own runs the connection, from the first `read`, `position` or `seek` until `close`. Needs
    `pip install "streamrec[faust]"`, or aiokafka alone.

    >>> Kafka("clicks", "broker.example:9092", start="yesterday")
    Traceback (most recent call last):
        ...
    streamrec.errors.ConfigError: start must be "earliest" or "latest", got 'yesterday'
    """

    # what __del__ needs, also where __init__ raised
    _link: Link | None = None

    def __init__(
        self,
        topics: str | Sequence[str],
        bootstrap_servers: str | Sequence[str],
        *,
        decode: Callable[[bytes], Event] = decode_event,
        partitions: Sequence[int] | None = None,
        follow: bool = False,
        idle: float | None = None,
        start: str = "earliest",
        timeout: float = 30.0,
        prefetch: int = 10_000,
        group: str | None = None,
        client: Mapping[str, Any] | None = None,
    ) -> None:
        names = [topics] if isinstance(topics, str) else list(topics)
        if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
            raise ConfigError(f"topics must be one name or several different ones, got {topics!r}")
        if not bootstrap_servers:
            raise ConfigError(f'bootstrap_servers must be "host:port", or several, got {bootstrap_servers!r}')
        if start not in ("earliest", "latest"):
            raise ConfigError(f'start must be "earliest" or "latest", got {start!r}')
        if not timeout > 0:
            raise ConfigError(f"timeout must be > 0 seconds, got {timeout!r}")
        if idle is not None and not idle > 0:
            raise ConfigError(f"idle must be > 0 seconds, or None, got {idle!r}")
        if prefetch < 1:
            raise ConfigError(f"prefetch must be >= 1 message, got {prefetch!r}")
        if partitions is not None and (not partitions or not all(type(one) is int and one >= 0 for one in partitions)):
            raise ConfigError(f"partitions must be numbers >= 0, at least one, or None for all, got {partitions!r}")
        self._plan = Plan(
            tuple(names),
            bootstrap_servers if isinstance(bootstrap_servers, str) else tuple(bootstrap_servers),
            None if partitions is None else tuple(sorted(set(partitions))),
            follow,
            start,
            float(timeout),
            prefetch,
            group,
            dict(client or {}),
        )
        self._decode = decode
        self._idle = idle
        self._next: dict[Partition, int] | None = None  # the position; None: not known before the first connection
        self._asked: dict[Partition, int] | None = None  # the last one asked for: the group's offsets follow it
        self._committed: dict[Partition, int] | None = None
        self._closed = threading.Event()
        self._since: float | None = None  # when `wait` began to find nothing

    def __repr__(self) -> str:
        return f"Kafka({list(self._plan.topics)!r}, {self._plan.servers!r})"

    def close(self) -> None:
        """Leave the broker; ends a `read` that waits in another thread. The position stays; a later `read` connects
        again, and then also sees what has been added to the topics since."""
        self._closed.set()
        link, self._link = self._link, None
        if link is not None:
            if self._plan.group is not None and self._asked is not None and self._asked != self._committed:
                link.commit(self._asked)
            link.close()

    def read(self, limit: int) -> list[Item]:
        """The next events, at most `limit`, with a `DeadLetter` for what could not be decoded.

        Raises `SourceError` where a topic is not there, no broker answers for `timeout` seconds, or a message cannot
        be fetched; the position is then that before the call.
        """
        if limit < 1:
            raise ConfigError(f"limit must be >= 1, got {limit!r}")
        link = self._open()
        if self._plan.group is not None and self._asked is not None and self._asked != self._committed:
            # what was asked for before this read is in a checkpoint by now, or on its way there
            link.commit(self._asked)
            self._committed = self._asked
        chunks = self._take(link, limit)
        items: list[Item] = []
        starts: list[int] = []  # of the chunks, among the items
        lines: list[bytes] = []  # of those in the default form
        for chunk in chunks:
            starts.append(len(items))
            if chunk.lost is not None:
                items.append(chunk.lost)
            else:
                self._read(items, lines, chunk)
        reached = dict(self._next or {})
        for chunk in chunks:
            reached[chunk.partition] = chunk.next
        self._next = reached
        place = partial(_place, chunks, starts)
        return Decoded(items, place, lines) if len(lines) == len(items) else Placed(items, place)

    def _take(self, link: Link, limit: int) -> list[Chunk]:
        if not self._plan.follow:
            return link.take(limit, None)
        idle, self._since = self._left(), None
        with signalled() as stopped:
            return link.take(limit, idle, lambda: self._closed.is_set() or stopped())

    def wait(self, seconds: float) -> bool:
        """Wait until the next `read` returns at once; False where that has not come in so many seconds."""
        if not self._plan.follow:
            return True
        if self._open().filled(seconds) or self._closed.is_set():
            return True
        if self._since is None:
            self._since = time.monotonic() - seconds
        return self._left() == 0.0

    def _left(self) -> float | None:
        """How long a read may still wait for a message."""
        if self._idle is None or self._since is None:
            return self._idle
        return max(0.0, self._since + self._idle - time.monotonic())

    @property
    def repeatable(self) -> bool:
        """Whether messages come in the same order each time, which those of several partitions do not."""
        return len(self._plan.topics) == 1 and self._plan.partitions is not None and len(self._plan.partitions) == 1

    def position(self) -> Position:
        """`{topic: {partition: offset}}`, of the next message of each partition. Connects, if that has not been."""
        if self._next is None:
            self._open()
        known = self._next or {}
        self._asked = known
        found: dict[str, dict[str, int]] = {}
        for (topic, partition), offset in sorted(known.items()):
            found.setdefault(topic, {})[str(partition)] = offset
        return found

    def seek(self, position: Position) -> None:
        """Go to a position. Partitions it does not name begin at the earliest message: they are newer than it is.

        Raises `SourceError` where it is none, or names a topic or a partition that is not read here.
        """
        wanted: dict[Partition, int] = {}
        for topic, offsets in position.items():
            for partition, offset in offsets.items() if isinstance(offsets, Mapping) else [("", None)]:
                if not str(partition).isdecimal() or type(offset) is not int or offset < 0:
                    raise SourceError(
                        f"no position {dict(position)!r}: it must be {{topic: {{partition: offset}}}}, as position() "
                        "gives it"
                    )
                wanted[Partition(topic, int(partition))] = offset
        link = self._open(wanted)
        self._next = link.go(wanted)
        self._asked = self._committed = None

    def lag(self) -> int:
        """How many messages the brokers hold that have not been read yet, by what they last said."""
        if self._link is None:
            return 0
        return sum(max(0, end - (self._next or {}).get(one, end)) for one, end in self._link.high_water().items())

    def _open(self, begin: Mapping[Partition, int] | None = None) -> Link:
        if self._link is None:
            self._closed.clear()
            link = Link(self._plan)
            try:
                begun = link.open(begin if begin is not None else self._next)
            except BaseException:
                link.close()
                raise
            self._link, self._next = link, begun
        return self._link

    def _read(self, items: list[Item], lines: list[bytes], chunk: Chunk) -> None:
        """Add its events, and what they were read from, where all are of the default form."""
        if self._decode is decode_event:
            # all good, as nearly all are; where not, the careful way finds which one, and why
            with suppress(ValueError, RecursionError, TypeError):
                values = [record.value for record in chunk.records]
                items += [*map(decode_event, values)]
                lines += values
                return
        for record in chunk.records:
            items.append(decode_message(record.value, chunk.partition, record.offset, self._decode))


def _place(chunks: Sequence[Chunk], starts: Sequence[int], index: int) -> Position:
    """Where the item with this index stands; each message is one item, and so is word that some are lost."""
    number = bisect_right(starts, index) - 1
    chunk = chunks[number]
    if chunk.lost is not None:
        return chunk.lost.position
    topic, partition = chunk.partition
    return {"topic": topic, "partition": partition, "offset": chunk.records[index - starts[number]].offset}


def decode_message(
    value: bytes | None, partition: tuple[str, int], offset: int, decode: Callable[[bytes], Event] = decode_event
) -> Item:
    """The event in a message's value, or a `DeadLetter` that says where it stands and what is wrong with it.

    >>> decode_message(b"{", ("clicks", 3), 17).position
    {'topic': 'clicks', 'partition': 3, 'offset': 17}
    """
    if value is None:
        return letter(partition, offset, "malformed: the message has no value", b"")
    try:
        event: Any = decode(value)
    except Exception as error:
        # Broad on purpose: `decode` may be the user's, and no message, however odd, may stop the stream.
        return letter(partition, offset, f"malformed: {error} ({type(error).__name__})", value)
    if isinstance(event, _EVENTS):
        return event
    return letter(partition, offset, f"malformed: decode returned a {type(event).__name__}, which is no event", value)
