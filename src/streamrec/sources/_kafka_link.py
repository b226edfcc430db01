"""The connection of a Kafka source: a thread with an event loop that fetches ahead, merges, and says what is wrong."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from streamrec.errors import SourceError
from streamrec.events import DeadLetter
from streamrec.sources._kafka_connect import Partition, Plan, connect, names_of

__all__ = ["Chunk", "Link", "letter"]

T = TypeVar("T")

_MAX_REASON = 500
_POLL = 0.2  # seconds a fetch waits for messages before the pump looks around
_PROBE = 2.0  # seconds of silence after which the broker is asked whether it is there
_ALIGN = 1.0  # seconds that partitions wait for one that is behind
_SLICE = 64  # messages of one partition that are handed on before another's
_CUT = 0.1  # seconds between two looks for a signal, while a read waits


def letter(partition: tuple[str, int], offset: int, reason: str, raw: bytes) -> DeadLetter:
    position = {"topic": partition[0], "partition": partition[1], "offset": offset}
    return DeadLetter(position=position, reason=reason[:_MAX_REASON], raw=raw)


class Chunk(NamedTuple):
    """Messages of one partition, in order; or word that some are lost. `next`: the offset behind them."""

    partition: Partition
    records: Sequence[Any]
    next: int
    lost: DeadLetter | None = None

    @property
    def time(self) -> int:
        """Of its first message, in milliseconds, as Kafka has it."""
        return self.records[0].timestamp if self.records else 0

    def split(self, count: int) -> tuple[Chunk, Chunk]:
        head, tail = self.records[:count], self.records[count:]
        return self._replace(records=head, next=tail[0].offset), self._replace(records=tail)


class Link:
    """The connection: a thread with an event loop that fetches ahead, and a bounded buffer in front of it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._changed = threading.Condition()  # guards the five below
        self._buffer: deque[Chunk] = deque()
        self._held = 0
        self._done = False
        self._error: Exception | None = None
        self._marks: dict[Partition, int] = {}  # where the partitions end, by what the brokers last said
        # what follows belongs to the loop's thread
        self._loop = asyncio.new_event_loop()
        self._consumer: Any = None
        self._pump: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._at: dict[Partition, int] = {}  # the next to be put into the buffer
        self._ready: dict[Partition, deque[Chunk]] = {}  # fetched, and not yet merged into the buffer
        self._waits = 0.0  # since when the others wait for a partition of which nothing is ready
        self._ends: dict[Partition, int] = {}  # where to end, unless the topics are followed
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

    def open(self, begin: Mapping[Partition, int] | None) -> dict[Partition, int]:
        return self._ask(self._connect(begin))

    def go(self, wanted: Mapping[Partition, int]) -> dict[Partition, int]:
        return self._ask(self._go(wanted))

    def commit(self, offsets: Mapping[Partition, int]) -> None:
        asyncio.run_coroutine_threadsafe(self._commit(dict(offsets)), self._loop)

    def high_water(self) -> dict[Partition, int]:
        with self._changed:
            return dict(self._marks)

    def take(self, limit: int, idle: float | None, stop: Callable[[], bool] = lambda: False) -> list[Chunk]:
        """At most `limit` messages; none at the end, after `idle` seconds, or where `stop` says so."""
        taken: list[Chunk] = []
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

    def filled(self, seconds: float) -> bool:
        """Whether there is a message or an error to be taken, waiting for so many seconds."""
        with self._changed:
            if not self._buffer and self._error is None and not self._done and seconds > 0:
                self._changed.wait(seconds)
            return bool(self._buffer) or self._error is not None or self._done

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

    async def _connect(self, begin: Mapping[Partition, int] | None) -> dict[Partition, int]:
        self._room.set()
        plan = self._plan
        self._consumer, found = await connect(plan)
        self._heard = self._loop.time()
        try:
            if not plan.follow:
                self._ends = await self._offsets(self._consumer.end_offsets, found)
            if begin is None and plan.start == "latest":
                begin = await self._offsets(self._consumer.end_offsets, found)
            return await self._begin(found, begin or {})
        except TimeoutError as error:
            raise self._silent() from error

    async def _offsets(self, ask: Callable[[Any], Any], of: Sequence[Partition]) -> dict[Partition, int]:
        """What the brokers say of these partitions; raises TimeoutError where they have said nothing for too long."""
        from aiokafka import TopicPartition

        until = self._heard + self._plan.timeout
        while True:
            left = until - self._loop.time()
            if left <= 0:
                raise TimeoutError
            try:
                answer = await asyncio.wait_for(ask([TopicPartition(*one) for one in of]), left)
            except asyncio.TimeoutError as error:
                raise TimeoutError from error
            except Exception:  # retriable, as all that can be asked here is: until the time is over
                await asyncio.sleep(0.2)
            else:
                self._heard = self._loop.time()
                return {Partition(*one): offset for one, offset in answer.items()}

    async def _begin(self, found: Sequence[Partition], begin: Mapping[Partition, int]) -> dict[Partition, int]:
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

    def _lose(self, one: Partition, first: int) -> None:
        """Say that all before `first` is gone, and go on there."""
        at = self._at[one]
        lost = f"lost: offsets {at} to {first - 1}, {first - at} messages, are no longer in the topic"
        self._ready[one].append(Chunk(one, (), first, letter(one, at, lost, b"")))
        self._at[one] = first

    async def _require(self, one: Partition, last: int) -> None:
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

    async def _go(self, wanted: Mapping[Partition, int]) -> dict[Partition, int]:
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

    async def _commit(self, offsets: dict[Partition, int]) -> None:
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
                f"cannot read on from {names_of(self._plan.servers)}: {found} ({type(found).__name__}); mend it and "
                "start again from the last checkpoint"
            )
            error.__cause__ = found
        with self._changed:
            self._error, self._done = error, True
            self._changed.notify_all()

    def _left(self) -> list[Partition]:
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

    async def _pull(self, wanted: Sequence[Partition], seconds: float, most: int) -> bool:
        """Fetch from these partitions; false where nothing came."""
        from aiokafka import TopicPartition
        from aiokafka.errors import OffsetOutOfRangeError

        partitions = [TopicPartition(*one) for one in wanted]
        try:
            got = await self._consumer.getmany(*partitions, timeout_ms=int(1000 * seconds), max_records=most)
        except OffsetOutOfRangeError as error:
            for partition in error.args[0]:
                one = Partition(*partition)
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
            one = Partition(*partition)
            end = self._ends.get(one)
            # behind what cannot be seen as well: the marks of transactions, what compaction has removed
            reached = max(records[-1].offset + 1, await self._consumer.position(partition))
            if not self._plan.follow and end is not None and reached >= end:
                records = [record for record in records if record.offset < end]
                reached = end
                self._consumer.pause(partition)
            self._at[one] = reached
            if records:
                self._ready[one].append(Chunk(one, records, reached))
            mark = self._consumer.highwater(partition)
            if mark is not None:
                marks[one] = mark
        self._put([], marks)
        return bool(got)

    def _merged(self) -> list[Chunk]:
        """What has been fetched, partitions side by side by the times of their messages, a few messages at a time.

        A backlog comes in large pieces of single partitions: handed on like that, one would run hours ahead of the
        others, and the label join would find the others' events late. So a partition of which more is known to come is
        waited for, though not for ever.
        """
        chunks: list[Chunk] = []
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

    def _known(self, one: Partition) -> int:
        """How far this partition is known to go, and is wanted."""
        mark = self._marks.get(one, 0)  # only this thread writes it
        return mark if self._plan.follow else min(mark, self._ends[one])

    def _put(self, chunks: Sequence[Chunk], marks: Mapping[Partition, int] | None = None) -> None:
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
                Partition(topic, number)
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
            f"no broker has answered at {names_of(self._plan.servers)} for {self._plan.timeout:g} s; start again when "
            "it is back, from the last checkpoint, or wait longer for it with a greater timeout"
        )
