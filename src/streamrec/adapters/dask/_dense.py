"""Dense models on the workers: a process each that computes its share of every step, and all move as one."""

from __future__ import annotations

import copy
import hashlib
import math
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from distributed import Client, wait
from torch import Tensor
from torch import distributed as dist

from streamrec.adapters.dask._cluster import (
    ClusterError,
    Task,
    given,
    require_client,
    result,
    submit,
    threads_of,
    told,
)
from streamrec.errors import ConfigError
from streamrec.evaluators import Report
from streamrec.models import BertCTR
from streamrec.protocols import State
from streamrec.storage import EncodedRows, Shelf, Store, Version
from streamrec.trainers import BatchTrainer, Dense

__all__ = ["SHARED", "fit_dense"]

SHARED = Dense, BertCTR
"""Models that several processes learn together."""
GRACE = 10.0
"""Seconds in which the others may say what went wrong, when one rank has lost them."""


class _Meeting(NamedTuple):
    """Where ranks meet, and how: `backend` is torch's."""

    host: str
    port: int
    size: int
    backend: str
    timeout: float


class _Probed(NamedTuple):
    """What a worker says of itself."""

    host: str
    gpus: int
    port: int


class _Ended(NamedTuple):
    """What a rank has come to: the sha256 of all it has learned."""

    digest: str
    report: Report


class _LostPeers(Exception):
    """A rank cannot reach the others: one of them has died, or does not answer in time."""


def fit_dense(
    client: Any,
    trainer: BatchTrainer,
    data: EncodedRows | str,
    *,
    ranks: int | None = None,
    restarts: int = 3,
    timeout: float = 300.0,
) -> Report:
    """Train a `Dense` or a `BertCTR` on the workers together: equal to `trainer.run(data)` alone, but for rounding.

    Every rank reads all rows and computes its share of each step; the gradients are summed (gloo; NCCL where each
    worker has a GPU of its own), so that the models stay equal bit for bit, which is checked at the end. Two ranks and
    one process with `accumulate=2` compute the same parts, and so does the one that is left where the other is lost.

    `trainer`: its store must be one that all workers can reach; the first rank writes its checkpoints and the version,
    and the training goes on from the newest one. `ranks`: how many workers take part, each with one thread; None: all.
    When one is lost the others are stopped, and those that live go on from the last checkpoint, `restarts` times at
    most. `timeout`: seconds for each rendezvous and each sum, so more than a checkpoint takes to write.

    At the end `trainer` is as if it had run here. Raises what a rank raised; `ConfigError` for arguments that cannot
    work; `ClusterError` where the cluster fails, or too often: then the store has the last checkpoint.
    """
    client = require_client(client)
    rows = EncodedRows(data) if isinstance(data, str) else data
    if not isinstance(trainer.model, SHARED):
        raise ConfigError(f"the model must be a Dense or a BertCTR, got a {type(trainer.model).__name__}")
    _check(trainer, rows, ranks, restarts, timeout)
    store = trainer.store
    sent = given(client, trainer)
    lost, parts = "", 0
    for _ in range(restarts + 1):
        living = sorted(threads_of(client))[:ranks]
        if not living:
            raise ClusterError("there are no workers; add some and call again: the store has the last checkpoint")
        at_once = getattr(trainer.model, "accumulate", 1)  # a BertCTR has micro-batches of its own
        parts = parts or len(living) * at_once  # the same for the rest, however many are left
        try:
            ended = _together(client, living, (sent, rows, parts), timeout)
        except _LostPeers as error:
            lost = str(error)
            continue
        digests = {one.digest for one in ended}
        if len(digests) > 1:
            raise ClusterError(
                f"{len(ended)} ranks have ended with {len(digests)} different models: the module is not the same "
                "everywhere; is something in it random that torch's seed does not decide?"
            )
        trainer.store = store
        return trainer.run(rows, progress=False)  # it has ended: this reads what was learned
    raise ClusterError(f"ranks were lost {restarts + 1} times, last: {lost}; the store has the last checkpoint")


def _check(trainer: BatchTrainer, rows: EncodedRows, ranks: int | None, restarts: int, timeout: float) -> None:
    if trainer.store is None:
        raise ConfigError("give the trainer a store that all workers can reach: it is where a lost rank goes on from")
    if ranks is not None and ranks < 1:
        raise ConfigError(f"ranks must be >= 1, or None for all workers, got {ranks!r}")
    if restarts < 0:
        raise ConfigError(f"restarts must be >= 0, got {restarts!r}")
    if not 0 < timeout < math.inf:
        raise ConfigError(f"timeout must be > 0 seconds, got {timeout!r}")
    trainer.model.schema.require(rows.schema, what="the rows")


def _together(client: Client, workers: Sequence[str], work: tuple[Any, ...], timeout: float) -> list[_Ended]:
    """Run one rank on each of these workers. Raises `_LostPeers` where they did not come to the end together."""
    asked = [Task("meet", _probe, (one,), [one], pinned=True) for one in workers]
    # every worker answers, so that no rank waits behind what else its worker does, such as a rank that was stopped
    probed: list[_Probed] = _gathered(client, asked, workers, timeout)
    devices = _devices(probed)
    meeting = _Meeting(probed[0].host, probed[0].port, len(workers), "nccl" if devices else "gloo", timeout)
    tasks = [
        Task("fit", _rank, (*work, meeting, rank, devices[rank] if devices else "cpu"), [one], pinned=True)
        for rank, one in enumerate(workers)
    ]
    return _gathered(client, tasks, workers, math.inf)  # each sum has its timeout


def _gathered(client: Client, tasks: Sequence[Task], workers: Sequence[str], seconds: float) -> list[Any]:
    """The results of tasks that are pinned to these workers, one each. Raises `_LostPeers` where one is gone.

    An error of a rank's own goes before that of the others, which have lost it.
    """
    futures = [submit(client, task) for task in tasks]
    deadline, lost = time.monotonic() + seconds, ""
    try:
        while True:
            with told(client), suppress(TimeoutError):
                wait(futures, timeout=0.5)  # type: ignore[no-untyped-call]
            there = threads_of(client)
            for future in futures:
                if future.status in ("error", "cancelled", "lost"):
                    try:
                        result(client, future, timeout=GRACE)
                    except _LostPeers as error:
                        deadline, lost = min(deadline, time.monotonic() + GRACE), lost or str(error)
            if all(future.status == "finished" for future in futures):
                return [result(client, future, timeout=GRACE) for future in futures]
            gone = [one for one in workers if one not in there]
            if gone:
                raise _LostPeers(f"the worker {gone[0]} is gone")
            if time.monotonic() > deadline or all(future.status == "error" for future in futures):
                raise _LostPeers(lost or f"a worker has not answered in {seconds:.0f} s")
    finally:
        with suppress(Exception):  # the first error is the one to raise
            client.cancel(futures, force=True)  # type: ignore[no-untyped-call]


def _probe(address: str) -> _Probed:
    """What the worker at this address can say, and a port that is free there."""
    host = urlsplit(address).hostname or "127.0.0.1"
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        free.bind((host, 0))
        return _Probed(host, torch.cuda.device_count(), free.getsockname()[1])


def _devices(probed: Sequence[_Probed]) -> list[str]:
    """A GPU for each rank, if every one can have its own; else none for any."""
    found, used = [], dict[str, int]()
    for one in probed:
        place = used.get(one.host, 0)
        if place >= one.gpus:
            return []
        used[one.host] = place + 1
        found.append(f"cuda:{place}")
    return found


# -- on the workers ----------------------------------------------------------------------------------------------------


def _rank(trainer: BatchTrainer, rows: EncodedRows, parts: int, meeting: _Meeting, rank: int, device: str) -> _Ended:
    """Run the trainer together with the other ranks."""
    trainer = copy.deepcopy(trainer)  # what was sent is kept, for the next try
    model = trainer.model
    assert isinstance(model, SHARED) and trainer.store is not None
    model.to(device)
    peers = _Ranks(meeting, rank, device)
    try:
        model.share(peers, parts)
        trainer.store = _SharedStore(trainer.store, peers)
        if rank:
            trainer.checkpoint_seconds = math.inf
        report = trainer.run(rows, progress=False)
        peers.add(torch.zeros(1))  # none goes before all have come so far: the first holds the meeting
        return _Ended(_digest(model.state_dict()), report)
    finally:
        model.share(None)
        peers.close()


class _Ranks:
    """The other ranks, by a process group of torch's that is not made the process's own: it leaves nothing behind."""

    def __init__(self, meeting: _Meeting, rank: int, device: str) -> None:
        self.rank, self.size = rank, meeting.size
        self._device = torch.device(device)
        timeout = timedelta(seconds=meeting.timeout)
        try:
            self.store = dist.TCPStore(  # type: ignore[attr-defined]
                meeting.host, meeting.port, meeting.size, rank == 0, timeout
            )
            self._group: Any
            if meeting.backend == "nccl":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self._group = dist.ProcessGroupNCCL(self.store, rank, meeting.size, options)
            else:
                self._group = dist.ProcessGroupGloo(self.store, rank, meeting.size, timeout)
        except RuntimeError as error:  # torch's own are these
            raise _LostPeers(f"rank {rank} did not meet the others: {error}") from error

    def add(self, tensor: Tensor) -> None:
        """See `streamrec.trainers.Peers`."""
        here = tensor.to(self._device)
        try:
            self._group.allreduce([here]).wait()
        except RuntimeError as error:
            raise _LostPeers(f"rank {self.rank} has lost the others: {error}") from error
        if here is not tensor:
            tensor.copy_(here)

    def close(self) -> None:
        """Let go, so that the others hear of it at once."""
        self._group = None
        self.store = None  # type: ignore[assignment]


class _SharedStore(Store):
    """A store of which all ranks read the same, and the first alone writes."""

    def __init__(self, store: Store, peers: _Ranks) -> None:
        self.uri, self.keep = store.uri, store.keep
        self.checkpoints = _SharedShelf(store.checkpoints, peers)
        self.versions = _SharedShelf(store.versions, peers)


class _SharedShelf(Shelf):
    def __init__(self, shelf: Shelf, peers: _Ranks) -> None:
        self._shelf, self._peers = shelf, peers

    def read(self, number: int | None = None) -> tuple[Version, dict[str, Any]] | None:
        """The newest good version, as the first rank finds it."""
        found = self._shelf.read(number) if self._peers.rank == 0 else None
        newest = torch.tensor([found[0].number if found is not None else 0], dtype=torch.float64)
        self._peers.add(newest)
        if self._peers.rank and newest:
            found = self._shelf.read(int(newest))
        self._peers.add(newest)  # nothing is written before all have read
        return found

    def write(self, state: State, info: Mapping[str, Any] = {}, base: int | None = None) -> Version:
        if self._peers.rank == 0:
            return self._shelf.write(state, info, base)
        return Version(0, 0.0, 0, "", info)


def _digest(state: Any) -> str:
    """The sha256 of a state: equal for equal ones, bit for bit."""
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Mapping):
            for name in sorted(value):
                digest.update(name.encode())
                feed(value[name])
        elif isinstance(value, (list, tuple)):
            for one in value:
                feed(one)
        elif isinstance(value, (Tensor, np.ndarray)):
            raw = value.contiguous().reshape(-1).view(torch.uint8).numpy() if isinstance(value, Tensor) else value
            digest.update(np.ascontiguousarray(raw).tobytes())
        else:
            digest.update(repr(value).encode())

    feed(state)
    return digest.hexdigest()
