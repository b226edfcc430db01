"""Kafka: events in the partitions of Kafka topics."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from typing_extensions import Self

from streamrec.errors import ConfigError, SourceError
from streamrec.events import DeadLetter, Event, Feedback, Impression, Item, Labeled, Position, decode_event

__all__ = ["Kafka", "decode_message"]

T = TypeVar("T")

_EVENTS = (Impression, Feedback, Labeled)
_MAX_REASON = 500
_POLL = 0.2  # seconds a fetch waits for messages before the pump looks around
_PROBE = 2.0  # seconds of silence after which the broker is asked whether it is there
_ALIGN = 1.0  # seconds that partitions wait for one that is behind
_SLICE = 64  # messages of one partition that are handed on before another's
_CUT = 0.1  # seconds between two looks for a signal, while a read waits


class Kafka:
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
    _link: _Link | None = None

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
        self._plan = _Plan(
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
        self._next: dict[_Partition, int] | None = None  # the position; None: not known before the first connection
        self._asked: dict[_Partition, int] | None = None  # the last one asked for: the group's offsets follow it
        self._committed: dict[_Partition, int] | None = None
        self._closed = threading.Event()

    def __repr__(self) -> str:
        return f"Kafka({list(self._plan.topics)!r}, {self._plan.servers!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # at the interpreter's end there may be no thread left to ask
            self.close()

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
        for chunk in chunks:
            if chunk.lost is not None:
                items.append(chunk.lost)
            else:
                self._read(items, chunk)
        reached = dict(self._next or {})
        for chunk in chunks:
            reached[chunk.partition] = chunk.next
        self._next = reached
        return items

    def _take(self, link: _Link, limit: int) -> list[_Chunk]:
        if not self._plan.follow:
            return link.take(limit, None)
        with _signalled() as signalled:
            return link.take(limit, self._idle, lambda: self._closed.is_set() or signalled())

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
        wanted: dict[_Partition, int] = {}
        for topic, offsets in position.items():
            for partition, offset in offsets.items() if isinstance(offsets, Mapping) else [("", None)]:
                if not str(partition).isdecimal() or type(offset) is not int or offset < 0:
                    raise SourceError(
                        f"no position {dict(position)!r}: it must be {{topic: {{partition: offset}}}}, as position() "
                        "gives it"
                    )
                wanted[_Partition(topic, int(partition))] = offset
        link = self._open(wanted)
        self._next = link.go(wanted)
        self._asked = self._committed = None

    def lag(self) -> int:
        """How many messages the brokers hold that have not been read yet, by what they last said."""
        if self._link is None:
            return 0
        return sum(max(0, end - (self._next or {}).get(one, end)) for one, end in self._link.high_water().items())

    def _open(self, begin: Mapping[_Partition, int] | None = None) -> _Link:
        if self._link is None:
            self._closed.clear()
            link = _Link(self._plan)
            try:
                begun = link.open(begin if begin is not None else self._next)
            except BaseException:
                link.close()
                raise
            self._link, self._next = link, begun
        return self._link

    def _read(self, items: list[Item], chunk: _Chunk) -> None:
        if self._decode is decode_event:
            # all good, as nearly all are; where not, the careful way finds which one, and why
            with suppress(ValueError, RecursionError, TypeError):
                items += [decode_event(record.value) for record in chunk.records]
                return
        for record in chunk.records:
            items.append(decode_message(record.value, chunk.partition, record.offset, self._decode))


def decode_message(
    value: bytes | None, partition: tuple[str, int], offset: int, decode: Callable[[bytes], Event] = decode_event
) -> Item:
    """The event in a message's value, or a `DeadLetter` that says where it stands and what is wrong with it.

    >>> decode_message(b"{", ("clicks", 3), 17).position
    {'topic': 'clicks', 'partition': 3, 'offset': 17}
    """
    if value is None:
        return _letter(partition, offset, "malformed: the message has no value", b"")
    try:
        event: Any = decode(value)
    except Exception as error:
        # Broad on purpose: `decode` may be the user's, and no message, however odd, may stop the stream.
        return _letter(partition, offset, f"malformed: {error} ({type(error).__name__})", value)
    if isinstance(event, _EVENTS):
        return event
    return _letter(partition, offset, f"malformed: decode returned a {type(event).__name__}, which is no event", value)


def _letter(partition: tuple[str, int], offset: int, reason: str, raw: bytes) -> DeadLetter:
    position = {"topic": partition[0], "partition": partition[1], "offset": offset}
    return DeadLetter(position=position, reason=reason[:_MAX_REASON], raw=raw)


class _Partition(NamedTuple):
    topic: str
    number: int


class _Plan(NamedTuple):
    """What a connection needs to know."""

    topics: tuple[str, ...]
    servers: str | tuple[str, ...]
    partitions: tuple[int, ...] | None
    follow: bool
    start: str
    timeout: float
    prefetch: int
    group: str | None
    client: Mapping[str, Any]


class _Chunk(NamedTuple):
    """Messages of one partition, in order; or word that some are lost. `next`: the offset behind them."""

    partition: _Partition
    records: Sequence[Any]
    next: int
    lost: DeadLetter | None = None

    @property
    def time(self) -> int:
        """Of its first message, in milliseconds, as Kafka has it."""
        return self.records[0].timestamp if self.records else 0

    def split(self, count: int) -> tuple[_Chunk, _Chunk]:
        head, tail = self.records[:count], self.records[count:]
        return self._replace(records=head, next=tail[0].offset), self._replace(records=tail)


class _Link:
    """The connection: a thread with an event loop that fetches ahead, and a bounded buffer in front of it."""

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self._changed = threading.Condition()  # guards the five below
        self._buffer: deque[_Chunk] = deque()
        self._held = 0
        self._done = False
        self._error: Exception | None = None
        self._marks: dict[_Partition, int] = {}  # where the partitions end, by what the brokers last said
        # what follows belongs to the loop's thread
        self._loop = asyncio.new_event_loop()
        self._consumer: Any = None
        self._pump: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._at: dict[_Partition, int] = {}  # the next to be put into the buffer
        self._ready: dict[_Partition, deque[_Chunk]] = {}  # fetched, and not yet merged into the buffer
        self._waits = 0.0  # since when the others wait for a partition of which nothing is ready
        self._ends: dict[_Partition, int] = {}  # where to end, unless the topics are followed
        self._heard = 0.0
        self._thread = threading.Thread(target=self._run, name="streamrec-kafka", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)  # of a client that could not be stopped in time
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    def _ask(self, todo: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(todo, self._loop).result()

    # -- from the reader's thread --------------------------------------------------------------------------------------

    def open(self, begin: Mapping[_Partition, int] | None) -> dict[_Partition, int]:
        return self._ask(self._connect(begin))

    def go(self, wanted: Mapping[_Partition, int]) -> dict[_Partition, int]:
        return self._ask(self._go(wanted))

    def commit(self, offsets: Mapping[_Partition, int]) -> None:
        asyncio.run_coroutine_threadsafe(self._commit(dict(offsets)), self._loop)

    def high_water(self) -> dict[_Partition, int]:
        with self._changed:
            return dict(self._marks)

    def take(self, limit: int, idle: float | None, stop: Callable[[], bool] = lambda: False) -> list[_Chunk]:
        """At most `limit` messages; none at the end, after `idle` seconds, or where `stop` says so."""
        taken: list[_Chunk] = []
        until = None if idle is None else time.monotonic() + idle
        with self._changed:
            while not self._buffer:
                if self._error is not None:
                    raise self._error
                if self._done or stop() or (until is not None and time.monotonic() >= until):
                    return taken
                self._changed.wait(_CUT)
            while self._buffer and limit:
                chunk = self._buffer.popleft()
                size = max(1, len(chunk.records))
                if size > limit:
                    chunk, rest = chunk.split(limit)
                    self._buffer.appendleft(rest)
                    size = limit
                taken.append(chunk)
                limit -= size
                self._held -= size
            room = self._held < max(1, self._plan.prefetch // 2)
        if room and not self._room.is_set():
            self._loop.call_soon_threadsafe(self._room.set)
        return taken

    def close(self) -> None:
        if not self._thread.is_alive():
            return
        with suppress(Exception):  # nobody is left to be told that the broker did not hear the goodbye
            self._ask(asyncio.wait_for(self._leave(), 5.0))
        with self._changed:
            self._done = True
            self._changed.notify_all()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    # -- in the loop's thread ------------------------------------------------------------------------------------------

    async def _leave(self) -> None:
        await self._halt()
        if self._consumer is not None:
            await self._consumer.stop()

    async def _connect(self, begin: Mapping[_Partition, int] | None) -> dict[_Partition, int]:
        try:
            from aiokafka import AIOKafkaConsumer
        except ImportError as error:
            raise ConfigError('the Kafka source needs aiokafka: pip install "streamrec[faust]"') from error
        self._room.set()
        plan = self._plan
        deadline = self._loop.time() + plan.timeout
        # shorter than the whole, so that a client gives up by itself: one that is cancelled leaks its connection
        asked = min(max(0.5, plan.timeout / 2), 40.0)
        settings: dict[str, Any] = {"request_timeout_ms": int(1000 * asked)}
        settings |= plan.client
        settings |= {
            "bootstrap_servers": plan.servers if isinstance(plan.servers, str) else list(plan.servers),
            "group_id": plan.group,
            "enable_auto_commit": False,
            "auto_offset_reset": "none",
        }
        trouble: BaseException | None = None
        while True:
            left = deadline - self._loop.time()
            if left <= 0:
                raise SourceError(
                    f"no broker has answered at {_servers(plan.servers)} for {plan.timeout:g} s"
                    f"{f' ({trouble})' if trouble and str(trouble) else ''}; check bootstrap_servers, and that the "
                    "broker is up and lets this machine in"
                )
            try:
                consumer = AIOKafkaConsumer(**settings)
            except Exception as error:
                raise ConfigError(f"aiokafka refuses these settings: {error}") from error
            try:
                await asyncio.wait_for(consumer.start(), left + 2 * asked)
                found = await asyncio.wait_for(self._partitions(consumer), max(0.1, deadline - self._loop.time()))
                break
            except (SourceError, ConfigError):
                await _stop(consumer)
                raise
            except Exception as error:
                # refused, reset, no address, not the leader yet, ...: whatever it is, it may pass
                trouble = error if not isinstance(error, asyncio.TimeoutError) else trouble
                await _stop(consumer)
                await asyncio.sleep(min(0.2, max(0.0, left)))
        self._consumer = consumer
        self._heard = self._loop.time()
        try:
            if not plan.follow:
                self._ends = await self._offsets(consumer.end_offsets, found)
            if begin is None and plan.start == "latest":
                begin = await self._offsets(consumer.end_offsets, found)
            return await self._begin(found, begin or {})
        except TimeoutError as error:
            raise self._silent() from error

    async def _partitions(self, consumer: Any) -> list[_Partition]:
        """What to read. Raises `SourceError` where a topic or a partition is not there."""
        there = await consumer.topics()
        found = []
        for topic in self._plan.topics:
            numbers = consumer.partitions_for_topic(topic) if topic in there else None
            if not numbers:
                raise SourceError(
                    f"the broker has no topic {topic!r}; create it first, or check the name: it has "
                    f"{', '.join(sorted(there)[:10]) or 'none'}"
                )
            wanted = sorted(numbers) if self._plan.partitions is None else self._plan.partitions
            missing = set(wanted) - set(numbers)
            if missing:
                raise SourceError(f"topic {topic!r} has partitions {sorted(numbers)}, not {sorted(missing)}")
            found += [_Partition(topic, number) for number in wanted]
        return found

    async def _offsets(self, ask: Callable[[Any], Any], of: Sequence[_Partition]) -> dict[_Partition, int]:
        """What the brokers say of these partitions; raises TimeoutError where they have said nothing for too long."""
        from aiokafka import TopicPartition

        until = self._heard + self._plan.timeout
        while True:
            left = until - self._loop.time()
            try:
                if left <= 0:
                    raise TimeoutError
                answer = await asyncio.wait_for(ask([TopicPartition(*one) for one in of]), left)
            except asyncio.TimeoutError as error:
                raise TimeoutError from error
            except Exception:  # retriable, as all that can be asked here is: until the time is over
                await asyncio.sleep(0.2)
            else:
                self._heard = self._loop.time()
                return {_Partition(*one): offset for one, offset in answer.items()}

    async def _begin(self, found: Sequence[_Partition], begin: Mapping[_Partition, int]) -> dict[_Partition, int]:
        """Assign, and start to fetch from `begin`; where that says nothing, from the earliest."""
        from aiokafka import TopicPartition

        strange = set(begin) - set(found)
        if strange:
            raise SourceError(
                f"the position names {', '.join(f'{one.topic}/{one.number}' for one in sorted(strange))}, which are "
                "not read here: read the topics and partitions that it is from, or start with an empty store"
            )
        first = await self._offsets(self._consumer.beginning_offsets, found)
        last = await self._offsets(self._consumer.end_offsets, found)
        self._consumer.assign([TopicPartition(*one) for one in found])
        self._at = {one: begin.get(one, first[one]) for one in found}
        self._ready = {one: deque() for one in found}
        begun = dict(self._at)
        with self._changed:
            self._buffer.clear()
            self._held = 0
            self._error, self._done = None, False
            self._marks = last
        for one, offset in begun.items():
            if offset < first[one]:
                self._lose(one, first[one])
            elif offset > last[one]:
                await self._require(one, last[one])
        for one, offset in self._at.items():
            self._consumer.seek(TopicPartition(*one), offset)
            if not self._plan.follow and offset >= self._ends[one]:
                self._consumer.pause(TopicPartition(*one))
        self._room.set()
        self._pump = self._loop.create_task(self._fill())
        return begun

    def _lose(self, one: _Partition, first: int) -> None:
        """Say that all before `first` is gone, and go on there."""
        at = self._at[one]
        lost = f"lost: offsets {at} to {first - 1}, {first - at} messages, are no longer in the topic"
        self._ready[one].append(_Chunk(one, (), first, _letter(one, at, lost, b"")))
        self._at[one] = first

    async def _require(self, one: _Partition, last: int) -> None:
        """Raise if the partition ends before its position.

        Not by the end that the broker has told alone: there are brokers that tell it too low. A fetch knows.
        """
        from aiokafka import TopicPartition
        from aiokafka.errors import OffsetOutOfRangeError

        partition = TopicPartition(*one)
        self._consumer.seek(partition, self._at[one])
        try:
            await self._consumer.getmany(partition, timeout_ms=500, max_records=1)
        except OffsetOutOfRangeError as error:
            raise SourceError(
                f"topic {one.topic!r}, partition {one.number}, ends at offset {last}, before the position "
                f"{self._at[one]}: it is not the topic that the position is from, or it was made anew; start with an "
                "empty store to read it from its beginning"
            ) from error

    async def _go(self, wanted: Mapping[_Partition, int]) -> dict[_Partition, int]:
        await self._halt()
        try:
            self._heard = self._loop.time()
            return await self._begin(list(self._at), wanted)
        except TimeoutError as error:
            raise self._silent() from error

    async def _halt(self) -> None:
        pump, self._pump = self._pump, None
        if pump is not None:
            pump.cancel()
            with suppress(asyncio.CancelledError):
                await pump

    async def _commit(self, offsets: dict[_Partition, int]) -> None:
        from aiokafka import TopicPartition

        # only for those who watch the lag: what goes wrong here is put right by the next one
        with suppress(Exception):
            await asyncio.wait_for(
                self._consumer.commit({TopicPartition(*one): offset for one, offset in offsets.items()}), 5.0
            )

    async def _fill(self) -> None:
        """Fetch, until there is nothing more to fetch, or something is wrong."""
        error: Exception | None = None
        try:
            while self._plan.follow or self._left() or any(self._ready.values()):
                await self._fetch()
        except asyncio.CancelledError:
            raise
        except TimeoutError:
            error = self._silent()
        except SourceError as found:
            error = found
        except Exception as found:
            error = SourceError(
                f"cannot read on from {_servers(self._plan.servers)}: {found} ({type(found).__name__}); mend it and "
                "start again from the last checkpoint"
            )
            error.__cause__ = found
        with self._changed:
            self._error, self._done = error, True
            self._changed.notify_all()

    def _left(self) -> list[_Partition]:
        return [one for one, at in self._at.items() if at < self._ends.get(one, 0)]

    async def _fetch(self) -> None:
        """Put what comes next into the buffer."""
        await self._room.wait()
        share = max(1, self._plan.prefetch // (2 * len(self._at)))
        came = False
        for one in list(self._at):
            if sum(len(chunk.records) for chunk in self._ready[one]) < share:
                came |= await self._pull([one], 0.0, share)
        if not came:
            # those that have nothing; where others wait for them, not for long
            empty = [one for one in self._at if not self._ready[one]]
            waits = len(empty) < len(self._at)
            came = bool(empty) and await self._pull(empty, 0.02 if waits else _POLL, share)
            if not came and not waits:
                await self._look_around()
                return
        self._put(self._merged())

    async def _pull(self, wanted: Sequence[_Partition], seconds: float, most: int) -> bool:
        """Fetch from these partitions; false where nothing came."""
        from aiokafka import TopicPartition
        from aiokafka.errors import OffsetOutOfRangeError

        partitions = [TopicPartition(*one) for one in wanted]
        try:
            got = await self._consumer.getmany(*partitions, timeout_ms=int(1000 * seconds), max_records=most)
        except OffsetOutOfRangeError as error:
            for partition in error.args[0]:
                one = _Partition(*partition)
                first = (await self._offsets(self._consumer.beginning_offsets, [one]))[one]
                if first <= self._at[one]:
                    raise SourceError(
                        f"topic {one.topic!r}, partition {one.number}, has no offset {self._at[one]} any more, and "
                        f"begins at {first}: it was made anew; start with an empty store to read it from its beginning"
                    ) from error
                self._lose(one, first)
                self._consumer.seek(partition, first)
            return True
        if got:
            self._heard = self._loop.time()
        marks = {}
        for partition, records in got.items():
            one = _Partition(*partition)
            end = self._ends.get(one)
            # behind what cannot be seen as well: the marks of transactions, what compaction has removed
            reached = max(records[-1].offset + 1, await self._consumer.position(partition))
            if not self._plan.follow and end is not None and reached >= end:
                records = [record for record in records if record.offset < end]
                reached = end
                self._consumer.pause(partition)
            self._at[one] = reached
            if records:
                self._ready[one].append(_Chunk(one, records, reached))
            mark = self._consumer.highwater(partition)
            if mark is not None:
                marks[one] = mark
        self._put([], marks)
        return bool(got)

    def _merged(self) -> list[_Chunk]:
        """What has been fetched, partitions side by side by the times of their messages, a few messages at a time.

        A backlog comes in large pieces of single partitions: handed on like that, one would run hours ahead of the
        others, and the label join would find the others' events late. So a partition of which more is known to come is
        waited for, though not for ever.
        """
        chunks: list[_Chunk] = []
        while heads := [(queue[0].time, one) for one, queue in self._ready.items() if queue]:
            if any(not self._ready[one] and at < self._known(one) for one, at in self._at.items()):
                self._waits = self._waits or self._loop.time()
                if self._loop.time() - self._waits < _ALIGN:
                    break
            else:
                self._waits = 0.0
            queue = self._ready[min(heads)[1]]
            chunk = queue.popleft()
            if len(chunk.records) > _SLICE:
                chunk, rest = chunk.split(_SLICE)
                queue.appendleft(rest)
            chunks.append(chunk)
        return chunks

    def _known(self, one: _Partition) -> int:
        """How far this partition is known to go, and is wanted."""
        mark = self._marks.get(one, 0)  # only this thread writes it
        return mark if self._plan.follow else min(mark, self._ends[one])

    def _put(self, chunks: Sequence[_Chunk], marks: Mapping[_Partition, int] | None = None) -> None:
        with self._changed:
            self._buffer += chunks
            self._held += sum(max(1, len(chunk.records)) for chunk in chunks)
            self._marks.update(marks or {})
            full = self._held >= self._plan.prefetch // 2  # the other half is in front of it, being merged
            self._changed.notify_all()
        if full:
            self._room.clear()

    async def _look_around(self) -> None:
        """Nothing has come for a while: is the broker there, has the topic grown?"""
        from aiokafka import TopicPartition

        if self._loop.time() - self._heard < _PROBE:
            return
        for one in list(self._at):  # behind what cannot be seen, of which no message tells
            self._at[one] = max(self._at[one], await self._consumer.position(TopicPartition(*one)))
        marks = await self._offsets(self._consumer.end_offsets, list(self._at))
        self._put([], marks)
        if self._plan.follow and self._plan.partitions is None:
            there = {
                _Partition(topic, number)
                for topic in self._plan.topics
                for number in self._consumer.partitions_for_topic(topic) or ()
            }
            if new := sorted(there - set(self._at)):
                self._at.update(await self._offsets(self._consumer.beginning_offsets, new))
                self._ready.update({one: deque() for one in new})
                self._consumer.assign([TopicPartition(*one) for one in self._at])
                for one, offset in self._at.items():
                    self._consumer.seek(TopicPartition(*one), offset)

    def _silent(self) -> SourceError:
        return SourceError(
            f"no broker has answered at {_servers(self._plan.servers)} for {self._plan.timeout:g} s; start again when "
            "it is back, from the last checkpoint, or wait longer for it with a greater timeout"
        )


async def _stop(consumer: Any) -> None:
    with suppress(Exception):  # it is given up; there is an error to be told already
        await asyncio.wait_for(consumer.stop(), 5.0)


def _servers(servers: str | tuple[str, ...]) -> str:
    return servers if isinstance(servers, str) else ", ".join(servers)


@contextmanager
def _signalled() -> Iterator[Callable[[], bool]]:
    """Tells whether SIGTERM or SIGINT has come since. Outside the main thread, where Python hears none: never.

    The handlers run as they would have: this only listens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    heard: list[int] = []

    def look() -> bool:
        with suppress(BlockingIOError):
            heard.extend(ours.recv(4096))
        return signal.SIGTERM in heard or signal.SIGINT in heard

    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield look
    finally:
        signal.set_wakeup_fd(before)
        ours.close()
        theirs.close()
