"""Running tasks on the user's cluster: nothing waits for ever, and what goes wrong says what to do."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

from distributed import Client, Future
from distributed.comm.core import CommClosedError
from distributed.protocol import pickle
from distributed.protocol.serialize import dask_serialize
from distributed.scheduler import KilledWorker

from streamrec.errors import ConfigError, StreamrecError
from streamrec.models import FM

__all__ = [
    "Asked",
    "ClusterError",
    "DeadlyTask",
    "Task",
    "given",
    "lost_scheduler",
    "once",
    "require_client",
    "result",
    "results",
    "spread",
    "submit",
    "threads_of",
    "told",
]

T = TypeVar("T")
Tag = TypeVar("Tag")

NOBODY = 300.0
"""Seconds in which a cluster that has no workers, for its last one died or none has come yet, may get one."""
SPREAD = 15.0
"""Seconds in which workers may get what tasks share, before the tasks are asked for all the same."""


@dask_serialize.register(FM)  # type: ignore[no-untyped-call, untyped-decorator]
def _as_pickle(model: FM) -> Any:
    """Between workers Dask takes a module of torch apart, attribute by attribute, and would send the addresses that an
    FM's loops were given, which are those of another process there. Told that it cannot, it goes by `__getstate__`; and
    a process that receives the model need not have loaded this room."""
    raise NotImplementedError


class ClusterError(StreamrecError):
    """The cluster did not do what it was asked for: its scheduler is lost, its workers die, or nothing moves on."""


class DeadlyTask(ClusterError):
    """Workers died again and again over one task."""


class Task(NamedTuple):
    """A call to be made on a worker. `key`: what the dashboard shows, before the dash. `pinned`: on no other than
    `workers`, even when they are gone: then it waits for ever, and who asked must look after that.

    Where it runs twice, because a worker was lost, the second call does no harm: it writes files of its own names,
    which count only when the client says so.
    """

    key: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    workers: Sequence[str] | None = None
    pinned: bool = False


def require_client(client: Any) -> Client:
    """The client, if it is one that can be waited for."""
    if not isinstance(client, Client):
        raise ConfigError(f"client must be the distributed.Client of your cluster, got {client!r}")
    if client.asynchronous:
        raise ConfigError("client is asynchronous: make one by Client(address), and call this from a thread")
    return client


def threads_of(client: Client) -> dict[str, int]:
    """How many threads each worker has, by its address. Raises `ClusterError` where the scheduler is lost."""
    if client.status != "running":  # else it would be called for half a minute
        raise lost_scheduler(client)
    with told(client):
        found: dict[str, int] = client.nthreads()  # type: ignore[no-untyped-call]
        return found


def submit(client: Client, task: Task) -> Future[Any]:
    """Ask for one task. Those of its arguments that are futures it gets as what they stand for.

    The rest goes as bytes, which client and scheduler hand on: they would look into every list and mapping for more
    futures, element by element, and the scheduler would make all of it anew only to send it on.
    """
    futures = {place: one for place, one in enumerate(task.arguments) if isinstance(one, Future)}
    rest = [None if place in futures else one for place, one in enumerate(task.arguments)]
    with told(client):
        future: Future[Any] = client.submit(
            _call,
            pickle.dumps((task.function, rest, tuple(futures))),  # type: ignore[no-untyped-call]
            *futures.values(),
            key=f"{task.key}-{time.time_ns():x}-{id(task):x}",
            pure=False,
            workers=task.workers,
            allow_other_workers=task.workers is not None and not task.pinned,
        )
        return future


def _call(packed: bytes, *values: Any) -> Any:
    function, arguments, places = pickle.loads(packed)  # type: ignore[no-untyped-call]
    for place, value in zip(places, values, strict=True):
        arguments[place] = value
    return function(*arguments)


def given(client: Client, value: Any) -> Future[Any]:
    """A value that tasks share: a worker gets it once, and it can be had again where the worker that held it is lost.

    What was scattered could not: nobody can make it again.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sending large graph", category=UserWarning)
        return submit(client, Task("given", _same, (value,)))


def _same(value: T) -> T:
    return value


def spread(client: Client, *values: Future[Any] | None) -> None:
    """Let every worker have what tasks share, before these are asked for: Dask sends a task to where its data is, and
    so all of them to the one that was first. A worker that comes later, or has not got it in time, gets it with a task
    that it steals."""
    with suppress(Exception):  # what is wrong with the cluster, the tasks will say
        client.replicate(  # type: ignore[no-untyped-call]
            [value for value in values if value is not None], callback_timeout=SPREAD
        )


class Asked(Generic[Tag]):
    """Tasks that a client was asked for, each with a tag, and have not been seen to end."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.tags: dict[Future[Any], Tag] = {}
        """The tag of each of their futures."""
        # by a call from the client and not by distributed.wait, which asks the client that is the default of all, and
        # looks at every future each time
        self._ended: SimpleQueue[Future[Any]] = SimpleQueue()

    def ask(self, tag: Tag, task: Task) -> None:
        """Ask for one more."""
        future = submit(self.client, task)
        self.tags[future] = tag
        future.add_done_callback(self._ended.put)  # type: ignore[no-untyped-call]

    def ended(self, *, timeout: float, at_most: float = math.inf) -> list[tuple[Tag, Future[Any]]]:
        """Those that have ended, one at least, unless that takes longer than `at_most` seconds. Raises `ClusterError`
        where none does in `timeout` seconds, or the cluster has lost its workers or its scheduler."""
        begun = peopled = time.monotonic()
        while True:
            found = []
            with suppress(Empty):
                found.append(self._ended.get(timeout=1.0))
                while True:
                    found.append(self._ended.get_nowait())
            if found:
                return [(self.tags.pop(future), future) for future in found]
            if time.monotonic() > begun + at_most:
                return []
            workers = len(threads_of(self.client))
            if workers:
                peopled = time.monotonic()
            elif time.monotonic() > peopled + NOBODY:
                raise ClusterError(
                    f"the cluster has had no worker for {NOBODY:.0f} s: see in the logs why they died, or start some, "
                    "and call again"
                )
            if time.monotonic() > begun + timeout:
                raise ClusterError(
                    f"no task has ended in {timeout:.0f} s, with {workers} workers; see what they do in the dashboard, "
                    "add workers, or raise timeout"
                )

    def cancel(self) -> None:
        """Leave nothing running."""
        with suppress(Exception):  # an error before is the one to raise
            self.client.cancel([*self.tags], force=True)  # type: ignore[no-untyped-call]


def results(
    client: Client, tasks: Sequence[Task], *, timeout: float, ahead: int = 0, deadly: bool = False
) -> Iterator[tuple[int, Any]]:
    """The place and the result of each task, as they end. `timeout`: seconds in which at least one must end.

    `ahead`: how many are asked for at a time; 0: all. Raises what a task raised, and `ClusterError` where the cluster
    fails; then nothing is left running. `deadly`: a task over which workers die is not such a failure; it has the
    `DeadlyTask` for its result.
    """
    waiting = list(enumerate(tasks))[::-1]
    asked = Asked[int](client)
    try:
        while waiting or asked.tags:
            while waiting and (not ahead or len(asked.tags) < ahead):
                asked.ask(*waiting.pop())
            for place, future in asked.ended(timeout=timeout):
                try:
                    found = result(client, future, timeout=timeout)
                except DeadlyTask as error:
                    if not deadly:
                        raise
                    found = error
                yield place, found
    finally:
        asked.cancel()


def result(client: Client, future: Future[Any], *, timeout: float) -> Any:
    """What a task that has ended returned; raises what it raised, or `ClusterError`."""
    with told(client):
        try:
            return future.result(timeout=timeout)
        except KilledWorker as error:
            raise DeadlyTask(
                f"workers died again and again over one task ({error}); their logs say why: memory, most often. Give "
                "them more, or make the parts smaller"
            ) from error


class told:
    """What distributed raises when the scheduler is lost becomes a `ClusterError`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, StreamrecError):
            return
        if isinstance(error, (CancelledError, CommClosedError, TimeoutError)):
            raise lost_scheduler(self._client) from error
        if isinstance(error, (RuntimeError, OSError)) and self._client.status != "running":
            raise lost_scheduler(self._client) from error


def lost_scheduler(client: Client) -> ClusterError:
    return ClusterError(
        f"the scheduler is lost, or has given up what it was asked for (client {client.status}); start it, make a new "
        "Client and call again: what is in the store or in whole files is not lost"
    )


_kept: dict[str, Any] = {}
_lock = threading.Lock()
_KEPT = 2


def once(key: str, make: Callable[[], T]) -> T:
    """What `make` makes, the first time a task of this worker asks for `key`; at most two such things are kept.

    For what tasks share and nobody changes: a pretrained model, say, that `search`'s `make` reads from a URI.

    >>> once("answer", lambda: [42]) is once("answer", lambda: [43])
    True
    """
    with _lock:  # a second thread waits for the first rather than load it again
        if key not in _kept:
            while len(_kept) >= _KEPT:
                _kept.pop(next(iter(_kept)))
            _kept[key] = make()
        found: T = _kept[key]
        return found
