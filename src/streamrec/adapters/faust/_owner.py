"""Owner: a worker's share of a topic, worked on by threads while it is this worker's."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet  # on Python 3.10 an error of its own
from contextlib import suppress
from typing import Any, TypeVar

from mode import Service

from streamrec.adapters.faust._gate import GROUP_ONLY
from streamrec.adapters.faust._membership import Claim, Membership, NotOwner
from streamrec.adapters.faust._outbox import Outbox
from streamrec.adapters.faust._topics import client, topic_name
from streamrec.errors import ConfigError, SourceError
from streamrec.events import DeadLetter, Event, Position
from streamrec.sources import Kafka

__all__ = ["NotOwner", "Owner", "Reading", "Underway"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_AGAIN = 1.0  # seconds
_LEAVING = 3.0  # seconds the broker may take when the worker is told to end


class Reading:
    """How a topic is read: checked settings that `train` and `join` have in common."""

    def __init__(
        self,
        topic: Any,
        *,
        batch: int,
        seconds: float,
        decode: Callable[[bytes], Event],
        dead_letters: str | None,
        prefetch: int,
        timeout: float,
        client: Mapping[str, Any] | None,
    ) -> None:
        if batch < 1:
            raise ConfigError(f"batch must be >= 1 event, got {batch!r}")
        for name, value in (("seconds", seconds), ("timeout", timeout)):
            if not value > 0:
                raise ConfigError(f"{name} must be > 0, got {value!r}")
        self.topic = topic_name(topic)
        self.batch, self.seconds, self.decode, self.dead_letters = batch, seconds, decode, dead_letters
        self.prefetch, self.timeout, self.client = prefetch, timeout, dict(client or {})


class Underway:
    """What was handed to the broker and has not been acknowledged: at most `most` at once."""

    def __init__(self, owner: Owner, most: int) -> None:
        self._owner, self._most = owner, most
        self._sent: deque[tuple[Future[Any], str]] = deque()

    def add(self, sent: Future[Any], what: str) -> None:
        """Wait for the oldest where there are too many. Raises `SourceError` where that is not acknowledged."""
        self._sent.append((sent, what))
        self._wait(self._most)

    def wait(self) -> None:
        """Until all have been acknowledged. Raises `SourceError` where one is not."""
        self._wait(0)

    def _wait(self, most: int) -> None:
        while len(self._sent) > most:
            # what is sent goes in turns: the broker has had the whole timeout for this one alone
            self._owner.answered(*self._sent.popleft())


class Owner(Service):
    """Joins `group` with the app, works on what it is given of the topic, and finishes before it gives that back.

    `jobs(partitions)`: what to do with these partitions, each on a thread of its own, until `self.enough` is set. An
    error in one crashes the worker, except `NotOwner`: then another has them by now.
    """

    def __init__(self, app: Any, reading: Reading, group: str, claim: Claim | None, **kwargs: Any) -> None:
        self.app, self.reading, self.group = app, reading, group
        self.enough = threading.Event()
        self.outbox = Outbox(app)
        self._leaving: float | None = None  # when the worker was told to end
        self._claim = claim
        self._membership: Membership | None = None
        self._threads: list[threading.Thread] = []
        self._main: asyncio.AbstractEventLoop | None = None
        super().__init__(**kwargs)

    def jobs(self, partitions: Sequence[int]) -> Sequence[Callable[[], None]]:
        raise NotImplementedError

    def given_up(self) -> None:
        """What this worker has learned since its last checkpoint is read again by another."""

    # -- in the app's loop ---------------------------------------------------------------------------------------------

    async def on_start(self) -> None:
        self._main = asyncio.get_running_loop()
        self._leaving = None
        timeout = self.reading.timeout
        settings = {
            **client(self.app),
            "session_timeout_ms": int(1000 * self.app.conf.broker_session_timeout),
            "heartbeat_interval_ms": int(1000 * self.app.conf.broker_heartbeat_interval),
            **self.reading.client,
        }
        deadline = self._main.time() + timeout
        while True:
            self._membership = Membership(
                self.reading.topic, self.group, settings,
                won=self._begin, lost=self._end, failed=self._put_out, claim=self._claim,
            )  # fmt: skip
            try:
                await asyncio.wait_for(self._membership.start(), max(0.1, deadline - self._main.time()))
                return
            except Exception as error:
                with suppress(Exception):
                    await asyncio.wait_for(self._membership.stop(), 5.0)
                if self._main.time() >= deadline:
                    raise SourceError(
                        f"no broker has answered at {settings['bootstrap_servers']} for {timeout:g} s "
                        f"({error}); check the app's broker setting, and that the broker is up"
                    ) from error
                await asyncio.sleep(0.2)

    async def on_stop(self) -> None:
        self._leaving = time.monotonic()
        await self._end()
        if self._membership is not None:
            with suppress(Exception):  # a broker that does not hear it finds out by itself
                await asyncio.wait_for(self._membership.stop(), 3.0)

    async def _begin(self, partitions: Sequence[int]) -> None:
        """These partitions are this worker's now."""
        await self._end()
        self.enough.clear()
        for job in self.jobs(partitions):
            thread = threading.Thread(target=self._do, args=(job,), name="streamrec-learn", daemon=True)
            self._threads.append(thread)
            thread.start()

    async def _end(self) -> None:
        """Finish the batches in hand, cut checkpoints, and stop."""
        threads, self._threads = self._threads, []
        self.enough.set()
        for thread in threads:
            await asyncio.get_running_loop().run_in_executor(None, thread.join)

    async def _put_out(self, error: Exception) -> None:
        told = SourceError(
            f"the broker does not let this worker into group {self.group!r}: {error or type(error).__name__}; a "
            "session timeout must be one it allows (the app's broker_session_timeout), and the client permitted to "
            "read the group"
        )
        told.__cause__ = error
        self._fail(told)

    async def _give_up(self, error: Exception) -> None:
        await self.crash(error)

    def _fail(self, error: Exception) -> None:
        log.error("no more is read from %r: %s", self.reading.topic, error, exc_info=error)
        self.add_future(self._give_up(error))

    # -- on a thread ---------------------------------------------------------------------------------------------------

    def _do(self, job: Callable[[], None]) -> None:
        while not self.enough.is_set():
            try:
                job()
            except NotOwner:
                # A rebalance ends this thread where it is another's. Where it is not, since what was written was by a
                # worker that the group has put out meanwhile, this one begins again at what that one has saved.
                self.given_up()
                log.warning("another worker has worked on this part of %r; standing by", self.reading.topic)
                self.enough.wait(_AGAIN)
            except Exception as error:
                self.given_up()
                self.call(self._fail, error)
                return

    def source(self, partitions: Sequence[int] | None = None) -> Kafka:
        """A source of these partitions, all if None, that looks up every so many seconds."""
        reading = self.reading
        own = {name: value for name, value in reading.client.items() if name not in GROUP_ONLY}
        return Kafka(
            reading.topic,
            client(self.app)["bootstrap_servers"],
            decode=reading.decode,
            partitions=partitions,
            follow=True,
            idle=reading.seconds,
            timeout=reading.timeout,
            prefetch=reading.prefetch,
            client={**client(self.app, servers=False), **own},
        )

    def bury(self, letter: DeadLetter, underway: Underway) -> None:
        """Count a dead letter of this topic, and send it to the dead letters' topic, if there is one."""
        self.count("streamrec_dead_letters", 1)
        topic = self.reading.dead_letters
        if topic is not None:
            underway.add(self.ask(self.outbox.bury(topic, letter)), f"the dead letters for topic {topic!r}")

    def commit(self, at: Position) -> None:
        """Tell the group's offsets, for those who watch the lag. Raises `NotOwner` where they are another's by now."""
        assert self._membership is not None
        offsets = {int(number): offset for number, offset in at.get(self.reading.topic, {}).items()}
        self.answered(self.ask(self._membership.commit(offsets)), f"the offsets of group {self.group!r}")

    def answered(self, sent: Future[T], what: str) -> T:
        """Wait for the broker, `timeout` seconds at most, or a few where the worker is to end.

        Raises `SourceError` where that is over, which says what was waited for.
        """
        timeout = self.reading.timeout
        until = time.monotonic() + timeout
        while True:
            with suppress(NotYet):
                return sent.result(0.1)
            if sent.done():  # meanwhile, or with an error that is called the same
                return sent.result()
            now, leaving = time.monotonic(), self._leaving
            if now < until and (leaving is None or now < leaving + _LEAVING):
                continue
            sent.cancel()
            raise SourceError(
                f"the broker has not acknowledged {what} for {timeout if now >= until else _LEAVING:g} s; check that "
                "it is up and has the topic, and start the worker again: it goes on from its last checkpoint; or give "
                "it a greater timeout"
            )

    def count(self, name: str, many: int) -> None:
        self.call(self.app.monitor.count, name, many)

    def ask(self, todo: Coroutine[Any, Any, Any]) -> Future[Any]:
        assert self._main is not None
        return asyncio.run_coroutine_threadsafe(todo, self._main)

    def call(self, todo: Callable[..., Any], *arguments: Any) -> None:
        assert self._main is not None
        with suppress(RuntimeError):  # the loop has ended
            self._main.call_soon_threadsafe(todo, *arguments)
