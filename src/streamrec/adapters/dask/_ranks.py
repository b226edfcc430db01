"""Ranks: parts of one job that run at the same time, each pinned to a worker, and talk to each other directly."""

from __future__ import annotations

import datetime
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch
from distributed import Client, get_worker
from distributed.comm.addressing import get_address_host
from numpy.typing import NDArray
from torch import distributed as dist

from streamrec.adapters.dask._cluster import Asked, ClusterError, Task, result, threads_of, told
from streamrec.storage._pack import pack, unpack

__all__ = ["Group", "Parted", "Ranks", "parting", "run_ranks"]

Tag = TypeVar("Tag")

GRACE = 5.0
"""Seconds in which the others may say what went wrong, when one rank has lost them."""

_torch: Any = dist  # what is used of it has no types


class Parted(ClusterError):
    """A rank, or its worker, was lost, or has not come in time."""


class Meeting(NamedTuple):
    """Where ranks meet: a `TCPStore` on the worker of the first of them, and a name of this meeting alone."""

    host: str
    port: int
    token: str
    timeout: float


class Ranks(NamedTuple):
    """Which ranks a worker has: by its address, their numbers."""

    of: Mapping[str, Sequence[int]]

    @staticmethod
    def placed(client: Client, count: int) -> Ranks:
        """`count` ranks over the workers there are, by their threads. A worker may have more ranks than threads: then
        these take turns. Raises `ClusterError` where there is no worker."""
        threads = threads_of(client)
        if not threads:
            raise ClusterError("there are no workers: start some, and wait for them by client.wait_for_workers(1)")
        of: dict[str, list[int]] = {address: [] for address in sorted(threads)}
        for number in range(count):
            least = min(of, key=lambda address: (len(of[address]) / threads[address], -threads[address], address))
            of[least].append(number)
        return Ranks({address: numbers for address, numbers in of.items() if numbers})


class Group:
    """The ranks of a job, seen from one of them. Nothing waits longer than the timeout of its meeting."""

    def __init__(self, number: int, size: int, meeting: Meeting | None, host: str, say: Callable[[Any], None]) -> None:
        self.number = number
        self.size = size
        self.say = say
        """Tells the client something, a sign of life."""
        self.host = host
        self.timeout = math.inf if meeting is None else meeting.timeout
        self.store: Any = None
        """Where these ranks, and no others, can tell each other of a group of another kind."""
        self._meeting = meeting
        self._group: Any = None
        self._memory: dict[tuple[str, int], torch.Tensor] = {}
        if meeting is None or size == 1:
            return
        patience = datetime.timedelta(seconds=meeting.timeout)
        with parting():
            store = _torch.TCPStore(meeting.host, meeting.port, is_master=False, timeout=patience)
            options = _torch.ProcessGroupGloo._Options()
            options._devices = [_torch.ProcessGroupGloo.create_device(hostname=host)]  # the address that workers use
            options._timeout = patience
            self.store = _torch.PrefixStore(meeting.token, store)
            self._group = _torch.ProcessGroupGloo(self.store, number, size, options)

    @property
    def sums(self) -> Any:
        """torch's own group, over gloo; None where there is one rank alone."""
        return self._group

    def close(self) -> None:
        """Close the connections: where others still wait for this rank, they part."""
        self._group = self.store = None

    def check(self) -> None:
        """Raise `Parted` where the client has given the job up."""
        if self._meeting is not None and self._meeting.token in _given_up:
            raise Parted("the job was given up")

    def gather(self, message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The messages of all ranks, each what a store can hold, in the order of their numbers. Each must call this
        equally often.

        Arrays that are received stay as they are until the next call. Raises `Parted`.
        """
        if self._group is None:
            return [message]
        mine = torch.frombuffer(bytearray().join(pack(message)), dtype=torch.uint8)
        length = torch.tensor([len(mine)]).view(torch.uint8)
        there = self._swap([length] * self.size, [len(length)] * self.size, "lengths")
        sizes = [int(size.view(torch.int64).sum()) for size in there]  # of this rank, nothing
        found = self._swap([mine] * self.size, sizes, "messages")
        return [message if rank == self.number else unpack(one.numpy()) for rank, one in enumerate(found)]

    def swap(self, give: Sequence[NDArray[Any]], want: Sequence[int]) -> list[NDArray[Any]]:
        """Give each rank the rows that are for it, and get so many from it as it gives: both must know. Rows are of one
        kind and width; this rank itself gives and gets none.

        What came stays as it is until the next call. Raises `Parted`.
        """
        kind, width = give[0].dtype, give[0].shape[1:]
        row = kind.itemsize * math.prod(width)
        mine = [torch.from_numpy(rows).flatten().view(torch.uint8) for rows in give]
        found = self._swap(mine, [row * count for count in want], "rows")
        return [one.numpy().view(kind).reshape(-1, *width) for one in found]

    def _swap(self, mine: Sequence[torch.Tensor], sizes: Sequence[int], what: str) -> list[torch.Tensor]:
        """Send each other rank these bytes, and receive so many from it.

        From rank to rank, from and into memory that is there: torch's own allgather takes new memory for all each time,
        which costs a system more than to send it.
        """
        theirs = [self._room(what, rank, size * (rank != self.number)) for rank, size in enumerate(sizes)]
        with parting():
            works = [self._group.recv([to], rank, 0) for rank, to in enumerate(theirs) if len(to)]
            for rank, one in enumerate(mine):
                if rank != self.number and len(one):
                    works.append(self._group.send([one], rank, 0))
            for work in works:
                work.wait()
        return theirs

    def _room(self, what: str, rank: int, size: int) -> torch.Tensor:
        """For what this rank sends."""
        memory = self._memory.get((what, rank), torch.empty(0, dtype=torch.uint8))
        if len(memory) < size:
            memory = self._memory[what, rank] = torch.empty(size + size // 4, dtype=torch.uint8)
        return memory[:size]


class parting:
    """What gloo raises where a rank is gone, or has not come in time, becomes a `Parted`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError):
            raise Parted(f"a rank is gone, or has not come in time: {str(error)[:300]}") from error


# -- on a worker -------------------------------------------------------------------------------------------------------

_stores: dict[str, Any] = {}
_given_up: deque[str] = deque(maxlen=100)


def _open(token: str, timeout: float) -> Meeting:
    """Open the store that ranks meet in, on a free port."""
    host = get_address_host(get_worker().address)
    patience = datetime.timedelta(seconds=timeout)
    store = _torch.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
    _stores[token] = store
    if token in _given_up:  # before this task's turn came
        del _stores[token]
        raise Parted("the job was given up")
    return Meeting(host, store.port, token, timeout)


async def _give_up(token: str) -> None:
    """By `client.run`, which a busy worker does too, and which waits for none that is a coroutine: the ranks of this
    job stop at their next step, and their store is closed."""
    _stores.pop(token, None)
    _given_up.append(token)


def _member(
    work: Callable[..., Any], meeting: Meeting, numbers: Sequence[int], size: int, topic: str, *arguments: Any
) -> list[Any]:
    """What these ranks return, which all run here."""
    worker = get_worker()
    host = get_address_host(worker.address)

    def say(what: Any) -> None:
        worker.log_event(topic, what)

    def one(number: int) -> Any:
        group = Group(number, size, meeting, host, say)
        try:
            return work(group, *arguments)
        finally:  # an error holds its frames, and they the group: the others would wait for this rank until the timeout
            group.close()

    if len(numbers) == 1:
        return [one(numbers[0])]
    with ThreadPoolExecutor(len(numbers)) as threads:
        futures = [threads.submit(one, number) for number in numbers]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:  # the others part because of one
        raise min(errors, key=lambda error: isinstance(error, Parted))
    return [future.result() for future in futures]


# -- at the client -----------------------------------------------------------------------------------------------------


def run_ranks(
    client: Client,
    work: Callable[..., Any],
    arguments: Sequence[Any],
    ranks: Ranks,
    *,
    timeout: float,
    silence: float | None = None,
    heard: Callable[[Any], None] = lambda what: None,
) -> list[Any]:
    """Call `work(group, *arguments)` for every rank, and return what each returned, in the order of their numbers.

    `arguments`: futures among them are had from the workers that hold them. `timeout`: seconds in which ranks must meet
    and hear of each other, and in which the client must hear of one; once they have been asked for, it must so in
    `silence` seconds, by default as many. `heard`: is given what they `say`.

    Raises what a rank raised; `Parted` where a rank or its worker is lost, after which the others stop by themselves;
    `ClusterError` where nothing was heard for too long, or the scheduler is lost.
    """
    size = sum(map(len, ranks.of.values()))
    token = secrets.token_hex(8)
    topic = f"streamrec-{token}"
    life = [time.monotonic()]

    def hear(event: tuple[float, Any]) -> None:
        life[0] = time.monotonic()
        heard(event[1])

    first = next(address for address, numbers in ranks.of.items() if 0 in numbers)
    asked = Asked[Sequence[int]](client)  # the numbers of the ranks of each task
    try:
        with told(client):
            client.subscribe_topic(topic, hear)  # type: ignore[no-untyped-call]
        asked.ask((), Task("meet", _open, (token, timeout), [first], True))
        [(_, opened)] = _wait(asked, ranks, timeout, life)
        meeting = result(client, opened, timeout=timeout)
        for address, numbers in ranks.of.items():
            task = Task("fit", _member, (work, meeting, numbers, size, topic, *arguments), [address], True)
            asked.ask(numbers, task)
        found: dict[int, Any] = {}
        while asked.tags:
            for numbers, future in _wait(asked, ranks, timeout if silence is None else silence, life):
                try:
                    found.update(zip(numbers, result(client, future, timeout=timeout), strict=True))
                except Parted as parted:
                    _raise_cause(asked, ranks, parted)
        return [found[number] for number in range(size)]
    finally:
        with suppress(Exception):  # the first error is the one to raise
            client.unsubscribe_topic(topic)  # type: ignore[no-untyped-call]
        asked.cancel()
        with suppress(Exception):
            # one that is gone would be called for half a minute
            living = [address for address in threads_of(client) if address in ranks.of]
            client.run(_give_up, token, workers=living, on_error="ignore", wait=False)


def _raise_cause(others: Asked[Any], ranks: Ranks, parted: Parted) -> None:
    """Raise what made the ranks part: what another of them raised, if that comes soon, or else the parting."""
    deadline = time.monotonic() + GRACE
    while others.tags and time.monotonic() < deadline:
        for _, future in _ended(others, ranks):
            with suppress(Parted):
                result(others.client, future, timeout=GRACE)
    raise parted


def _wait(asked: Asked[Tag], ranks: Ranks, timeout: float, life: list[float]) -> list[tuple[Tag, Any]]:
    """Those that have ended, one at least, while all workers are there and something is heard of them."""
    while True:
        done = _ended(asked, ranks)
        if done:
            return done
        if time.monotonic() > life[0] + timeout:
            raise ClusterError(
                f"nothing was heard of the ranks for {timeout:.0f} s: their workers are busy with other tasks, cannot "
                "reach each other, or a window takes longer; see the dashboard, or raise timeout"
            )


def _ended(asked: Asked[Tag], ranks: Ranks) -> list[tuple[Tag, Any]]:
    """Those that have ended, or do within a second. Raises `Parted` where a worker is gone."""
    done = asked.ended(timeout=math.inf, at_most=1.0)
    if not done:
        there = threads_of(asked.client)
        missing = [address for address in ranks.of if address not in there]
        if missing:
            raise Parted(f"the workers {', '.join(missing)} are gone")
    return done
